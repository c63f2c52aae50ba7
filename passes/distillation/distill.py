"""Distill: recover a pruned model by training it to do what the dense one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from compress.contract import TEACHER, Part, Pass
from compress.data import DataOptions
from compress.data.options import SOURCES
from compress.recipe import TrainingOptions
from passes.distillation.choice import Losses

if TYPE_CHECKING:
    from torch import nn

    from compress.state import State


class Distill(TrainingOptions, Pass):
    """Train the model towards the teacher's hidden states and predictions, validated by the same loss.

    Without `losses` they fit the task. Where blocks were dropped, each one left is compared with the one it was; where
    the hidden width is another, predictions or similarities alone are. Dropout is off, as the teacher's is. Embedding
    tables, and heads tied to them, stay as they are unless `embeddings` says otherwise or the width is another:
    nothing was cut from them, and they hold most parameters of a small model, so that a step without them takes about
    half the time.

    Distill steps in a row are stages, each with its teacher, its data and its losses. Where a step follows several,
    `after: [small, assistant]`, the first model learns from the others. `teachers` names further ones, `dense` among
    them; several are one that predicts the mean of their predictions, which alone can be compared then. `data` is what
    this stage learns from, if not the plan's.
    """

    version = 3
    merges = True

    requires = frozenset({TEACHER})
    touches = Part.VALUES
    together = True

    learning_rate: float = Field(
        default=2e-4, gt=0, description="its peak; rises over `warmup`, then falls as a cosine to 0"
    )
    dropout: bool = Field(default=False, description="whether the student's dropout is on")
    embeddings: bool | None = Field(
        default=None, description="whether embedding tables are trained as well; left out, where their width was cut"
    )
    losses: Losses | None = Field(default=None, description="weight or options of each loss; left out, what fits")
    teachers: tuple[str, ...] = Field(
        default=(), description="folders or hub names of models with this one's tokens, or dense; left out, dense"
    )
    surest: bool = Field(default=False, description="whether of several teachers the surest of a row count most")
    data: DataOptions | None = Field(default=None, description="texts for this stage; left out, the plan's")
    reference: str | None = Field(
        default=None, description="folder or hub name of a model like this that learned already, for losses with `keep`"
    )
    validation_rows: int = Field(default=512, ge=1, description="rows that a validation looks at, drawn once")

    @model_validator(mode="after")
    def _asked(self) -> Distill:
        losses = self.losses.chosen().values() if self.losses else ()
        if self.reference and not any(getattr(loss, "keep", 1) < 1 for loss in losses):
            raise ValueError("no loss asks the reference; expected one with keep below 1, such as logits: {keep: 0.4}")
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

        data = state.data
        if self.data is not None:
            state.data = Data.open(self.data, data.tokenizer, state.task)
        with taught_by(state, self.teachers, self.surest):
            self.recover(state)
        state.data = data
        yield state

    def recover(self, state: State) -> None:
        """Train the state's model towards its teacher."""
        from passes.distillation.compare import Comparison, same_hidden_width

        sample = next(iter(state.data.batches("train", 1)), {})
        labelled, same_width = not sample.keys() <= Comparison.inputs, same_hidden_width(state)
        losses = self.losses or Losses.fitting(state.task, labelled, same_width)
        tables_too = not same_width if self.embeddings is None else self.embeddings
        compare = Comparison(losses, state, self.reference)
        with nullcontext() if tables_too else still_tables(compare.student):
            state.figures |= compare.train(self, state.workshop.step, "distill", self.validation_rows)


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
