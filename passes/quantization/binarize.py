"""Binarize: an encoder of one bit a weight and an activation, trained towards the dense one and stored packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.contract import TEACHER, Fact, Part, Pass
from compress.recipe import TrainingOptions
from passes.distillation.choice import Losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.state import State

STAGES = (4, 2, 1)  # bits of activations, where a plan doesn't say


class Binarize(TrainingOptions, Pass):
    """Bring the blocks of an encoder, and its table of tokens, to one bit a weight and one bit an activation.

    `bibert` (Qin et al., "BiBERT", 2022) takes signs, lets a token see those whose score isn't negative, and matches
    the directions of queries, keys and values. `bit` (Liu et al., "BiT", 2022) learns steps and shifts, takes ReLU for
    the activation, and comes down in stages, each trained as long as the options say, with the stage before as its
    teacher; with `stages: [4]` activations keep 4 bits. Norms, positions and heads stay in floats. What comes out is
    packed and can't be trained any more.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({TEACHER})
    touches: ClassVar[Part] = Part.VALUES | Part.FORMAT

    method: Literal["bibert", "bit"] = "bit"
    stages: tuple[Literal[8, 4, 2, 1], ...] | None = Field(
        default=None, description="bit: bits of activations in each stage, those of the last to stay; left out, 4, 2, 1"
    )
    embeddings: bool = Field(default=True, description="whether the table of tokens is binary as well")
    learning_rate: float = Field(
        default=2e-4, gt=0, description="its peak; rises over `warmup`, then falls as a cosine to 0"
    )
    dropout: bool = Field(default=False, description="whether the student's dropout is on")
    losses: Losses | None = Field(default=None, description="weight or options of each loss; left out, what fits")
    validation_rows: int = Field(default=512, ge=1, description="rows that a validation looks at, drawn once")

    @model_validator(mode="after")
    def _downwards(self) -> Binarize:
        if self.stages is None:
            return self
        if self.method != "bit":
            raise ValueError(f"stages are for method: bit, met method: {self.method}")
        if not self.stages or self.stages != tuple(sorted(set(self.stages), reverse=True)):
            raise ValueError(f"met stages: {list(self.stages)}; expected fewer bits from stage to stage")
        return self

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with its model packed; figures tell the stages, and sizes and operations as counted."""
        from compress.binary import binarize_, keeps_table, pack_
        from compress.memory import stored_bytes
        from passes.distillation.compare import Comparison

        model = state.model
        reason = keeps_table(model) if self.embeddings else None
        size = stored_bytes(model)
        binarize_(model, state.layout, self.method, self.embeddings and reason is None)
        losses, taught = self._losses(state), state
        stages: list[dict[str, Any]] = []
        for bits in (self.stages or STAGES) if self.method == "bit" else (1,):
            if stages:
                taught = replace(state, facts=dict(state.facts))
                taught.becomes_dense()
            self._set(state, bits)
            compare = Comparison(losses, taught)
            folder = state.workshop.step / f"{bits}-bit"
            stages.append({"bits": bits, **compare.train(self, folder, f"binarize, {bits} bits", self.validation_rows)})
        inputs = _example(state)
        whole = _operations(model, inputs)
        pack_(model)
        left = _operations(model, inputs)
        state.figures |= {
            "stages": stages,
            "loss_before": stages[-1]["loss_before"],
            "loss_after": stages[-1]["loss_after"],
            "skipped": {"embeddings": reason} if reason else {},
            "stored_bytes": {"before": size, "after": stored_bytes(model)},
            "float_operations": {"before": whole, "after": left},
            "bit_operations": stages[-1]["bits"] * (whole - left),
        }
        yield state

    def _losses(self, state: State) -> Losses:
        """The losses asked for, or those that fit; both papers leave labels out."""
        if self.losses is not None:
            return self.losses
        fitting = Losses.fitting(state.task, labelled=False).chosen()
        return Losses.model_validate({**fitting, "directions": 1.0} if self.method == "bibert" else fitting)

    def _set(self, state: State, bits: int) -> None:
        """Let activations have so many bits, and choose their steps by the values of one batch."""
        from compress.binary import activate_
        from compress.codes import fitting
        from compress.data.calibration import calibration
        from compress.statistics import frozen

        activate_(state.model, bits)
        with frozen(state.model), fitting(state.model):
            for batch in calibration(state.data, self.batch_size, self.batch_size):
                state.model(**{name: part.to(state.model.device) for name, part in batch.items()})


def _operations(model: PreTrainedModel, inputs: dict[str, Any]) -> int:
    """Multiplications and additions of floats in the products of one call; counted bits are none."""
    from torch.utils.flop_counter import FlopCounterMode

    from compress.statistics import frozen

    with frozen(model), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def _example(state: State) -> dict[str, Any]:
    """One call of the shape that the target asks."""
    from compress.runtimes.examples import example_inputs

    inputs = example_inputs(state.model, state.tokenizer, state.target.batch, state.target.sequence)
    return {name: value.to(state.model.device) for name, value in inputs.items()}
