"""Distill: recover a pruned model by training it to do what the dense one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from compress.contract import TEACHER, Part, Pass
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
    """

    version = 3

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

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with the weights of the lowest validation loss."""
        from passes.distillation.compare import Comparison, same_hidden_width

        sample = next(iter(state.data.batches("train", 1)), {})
        labelled, same_width = not sample.keys() <= Comparison.inputs, same_hidden_width(state)
        losses = self.losses or Losses.fitting(state.task, labelled, same_width)
        tables_too = not same_width if self.embeddings is None else self.embeddings
        compare = Comparison(losses, state, self.reference)
        with nullcontext() if tables_too else still_tables(compare.student):
            state.figures |= compare.train(self, state.workshop.step, "distill", self.validation_rows)
        yield state


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
