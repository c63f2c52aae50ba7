"""Distill: recover a pruned model by training it to do what the dense one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from compress.contract import GRID, MASKS, PREDICTIONS, STATES, TEACHER, Fact, Options, Part, Pass
from compress.data import DataOptions
from compress.data.options import SOURCES
from compress.errors import TrainingError
from compress.recipe import TrainingOptions
from passes.distillation.choice import Losses
from passes.distillation.losses.base import Reads
from passes.distillation.mixture import Mixture
from passes.distillation.on_policy import OnPolicy
from passes.quantization.qat import Qat

if TYPE_CHECKING:
    from torch import nn

    from compress.state import State
    from compress.training import Batch
    from passes.distillation.translation import Translation


class Lora(Options):
    """Low-rank adapters, which alone are trained and are part of the weights afterwards; LoRA, arXiv:2106.09685."""

    rank: int = Field(default=16, ge=1, description="of each layer's adapter")
    alpha: float = Field(default=32.0, gt=0, description="over the rank it is what an adapter counts")


class Distill(TrainingOptions, Pass):
    """Train the model towards the teacher's hidden states and predictions, validated by the same loss.

    Without `losses` they fit the task. Where blocks were dropped, each one left is compared with the one it was; where
    the hidden width is another, predictions or similarities alone are. Dropout is off, as the teacher's is. Embedding
    tables, and heads tied to them, stay as they are unless `embeddings` says otherwise or the width is another:
    nothing was cut from them, and they hold most parameters of a small model, so that a step without them takes about
    half the time.

    Distill steps in a row are stages, each with its teacher, its data and its losses. Where a step follows several,
    `after: [small, assistant]`, the first model learns from the others. `teachers` names further ones, `dense` among
    them, that come before those. Several are one, of which predictions alone can be compared: the mean of theirs, or
    with `combine: shift` those of the student as it came, shifted as the first teacher is from the second, such as a
    fine-tuned one from what it was before. A language model's may have another tokenizer, if it is one alone and asked
    by losses that work across them. `data` is what this stage learns from, if not the plan's.

    With `lora` every linear layer has a low-rank adapter, and they alone are trained, in little memory: LLM-Neo (Yang
    et al., arXiv:2411.06839). The zeros of a sparse model stay, which adapters would fill. With `qat` the weights of
    the blocks are on a grid of few bits in the end, which nothing may change any more.
    """

    version = 4
    merges = True

    keeps = frozenset({MASKS})
    together = True

    learning_rate: float = Field(
        default=2e-4, gt=0, description="its peak; rises over `warmup`, then falls as a cosine to 0"
    )
    dropout: bool = Field(default=False, description="whether the student's dropout is on")
    embeddings: bool | None = Field(
        default=None, description="whether embedding tables are trained as well; left out, where their width was cut"
    )
    lora: Lora | None = Field(default=None, description="train low-rank adapters alone, and merge them at the end")
    qat: Qat | None = Field(default=None, description="train weights on a grid of few bits; null: as floats")
    losses: Losses | None = Field(default=None, description="weight or options of each loss; left out, what fits")
    teachers: tuple[str, ...] = Field(
        default=(),
        description="folders or hub names of models, with this one's tokens where losses need them; left out, dense",
    )
    combine: Literal["mean", "surest", "shift"] = Field(
        default="mean",
        description="how several teachers are one: their mean, the surest of a row counting most, a shift",
    )
    data: DataOptions | None = Field(default=None, description="texts for this stage; left out, the plan's")
    reference: str | None = Field(
        default=None, description="folder or hub name of a model like this that learned already, for losses with `keep`"
    )
    on_policy: OnPolicy | None = Field(
        default=None, description="how much is trained on what the student writes itself; left out, nothing"
    )
    mixture: Mixture | None = Field(
        default=None,
        description="how the corpora that `data.domain` names are mixed; left out, as they are in the data",
    )
    cached: bool = Field(
        default=False, description="whether the teacher is asked through what `teach` stored, and not loaded"
    )
    validation_rows: int = Field(default=512, ge=1, description="rows that a validation looks at, drawn once")

    @property
    def touches(self) -> Part:  # type: ignore[override]
        """Values, and with `qat` their format."""
        return Part.VALUES | Part.FORMAT if self.qat else Part.VALUES

    @property
    def provides(self) -> frozenset[Fact]:  # type: ignore[override]
        """With `qat` the grid."""
        return frozenset({GRID}) if self.qat else frozenset()

    @property
    def requires(self) -> frozenset[Fact]:  # type: ignore[override]
        """The teacher, or of what it said that which the losses read."""
        if not self.cached or self.losses is None:
            return frozenset({TEACHER})
        read = [loss.reads for loss in self.losses.chosen().values()]
        asked = ((PREDICTIONS, Reads.PREDICTIONS), (STATES, Reads.STATES))
        return frozenset(fact for fact, kind in asked if any(kind & one for one in read))

    @model_validator(mode="after")
    def _asked(self) -> Distill:
        chosen = self.losses.chosen() if self.losses else {}
        losses = chosen.values()
        for name, loss in chosen.items() if self.cached else ():
            for kind, what in ((Reads.ATTENTION, "attention"), (Reads.FEATURES, "what the classifier reads")):
                if loss.reads & kind:
                    raise ValueError(f"loss '{name}' reads {what}, which teach does not store; expected no cached")
        if self.cached and not any(loss.reads & (Reads.PREDICTIONS | Reads.STATES) for loss in losses):
            raise ValueError("cached is given, and no loss that asks the teacher; expected one, such as logits: 1")
        elsewhere = [name for name in ("teachers", "data", "on_policy", "mixture") if getattr(self, name)]
        if self.cached and elsewhere:
            raise ValueError(
                f"cached is what the dense model said of the plan's texts, in their order; expected no {elsewhere[0]}"
            )
        if self.reference and not any(getattr(loss, "keep", 1) < 1 for loss in losses):
            raise ValueError("no loss asks the reference; expected one with keep below 1, such as logits: {keep: 0.4}")
        if self.lora and self.embeddings:
            raise ValueError("with lora no embedding table is trained; expected embeddings to be left out")
        if self.lora and self.qat:
            raise ValueError("qat trains the weights themselves, which lora leaves; expected one of the two")
        if self.on_policy and any(loss.reads & Reads.LABELS for loss in losses):
            raise ValueError("on_policy writes texts that nobody has labelled; expected losses without task")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The models and the texts that this stage reads beside the plan's."""
        data = [self.data.location(name)[0] for name in SOURCES if getattr(self.data, name)] if self.data else []
        return tuple(name for name in (self.reference, *self.teachers, *data) if name and name != "dense")

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with the weights of the lowest validation loss."""
        from compress.data import Data
        from passes.distillation.teachers import taught_by

        if self.cached and state.others:
            raise TrainingError("distill: cached is what the dense model said; expected to follow one step")
        data = state.data
        if self.data is not None:
            state.data = Data.open(self.data, data.tokenizer, state.task)
        losses = self.losses.chosen().values() if self.losses else []
        across = [loss.across for loss in losses if loss.reads & ~Reads.LABELS]
        with taught_by(state, self.teachers, self.combine, bool(across) and all(across)) as translation:
            self.recover(state, translation)
        state.data = data
        yield state

    def recover(self, state: State, translation: Translation | None) -> None:
        """Train the state's model towards its teacher, which reads other tokens where there is a translation."""
        from compress.writing import ends_of
        from passes.distillation.compare import Comparison
        from passes.distillation.mixing import Mixing
        from passes.distillation.pairs import same_hidden_width
        from passes.distillation.taught import Taught

        if self.on_policy and not state.task.generates:
            raise TrainingError(
                f"distill: on_policy lets the student write, which models for {state.task.name} don't; expected "
                "text-generation"
            )
        sample = next(iter(state.data.batches("train", 1)), {})
        labelled, same_width = not sample.keys() <= Comparison.inputs, same_hidden_width(state)
        losses = self.losses or Losses.fitting(state.task, labelled, same_width)
        tables_too = not same_width if self.embeddings is None else self.embeddings
        stored = [state.facts[fact.name] for fact in self.requires - {TEACHER}]
        taught = Taught(stored, state.workshop.run, state.data) if self.cached else None
        if taught:
            state.dense.unload()
        compare = Comparison(losses, state, self.reference, taught, translation)
        turns: list[Callable[[Batch], Batch]] = []
        mixing = Mixing(self.mixture, state.data, compare.gap, lambda: compare.beside.share) if self.mixture else None
        if mixing:
            compare.beside["mixture"] = mixing
            turns.append(mixing.turn)
        if self.on_policy:
            turns.append(partial(self.on_policy.turn, student=state.model, ends=ends_of(state.model, state.tokenizer)))
        with self.limited(state, compare.student, tables_too) as skipped:
            trained = sum(one.numel() for one in compare.student.parameters() if one.requires_grad)
            told = compare.train(self, state.workshop.step, "distill", self.validation_rows, turns)
        state.figures |= {**told, "trained_parameters": trained, "skipped": skipped}
        if mixing:
            state.figures["mixture"] = mixing.figures()

    @contextmanager
    def limited(self, state: State, student: nn.Module, tables_too: bool) -> Iterator[dict[str, str]]:
        """Inside, what the options leave out of training stays as it is, and what they round is rounded.

        Yields the layers that can't be adapted or rounded, with the reason.
        """
        from passes.distillation.adapters import adapted
        from passes.quantization.rounded import on_grid

        if self.lora:
            if MASKS.name in state.facts:
                raise TrainingError("distill: adapters would fill the zeros of a sparse model; expected no lora")
            with adapted(student, self.lora.rank, self.lora.alpha, self.seed) as skipped:
                yield skipped
            return
        with ExitStack() as opened:
            if not tables_too:
                opened.enter_context(still_tables(student))
            yield opened.enter_context(on_grid(state, self.qat)) if self.qat else {}


@contextmanager
def still_tables(model: nn.Module) -> Iterator[None]:
    """Inside, no embedding table of the model is trained."""
    from torch import nn

    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    trained = [table for table in tables if table.requires_grad]
    for table in trained:
        table.requires_grad_(False)
    try:
        yield
    finally:
        for table in trained:
            table.requires_grad_(True)
