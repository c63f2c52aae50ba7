"""Lowbit: the matrices of all blocks in one or two bits a weight, trained towards the dense model and stored packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.contract import TEACHER, Fact, Part, Pass
from compress.recipe import TrainingOptions
from passes.distillation.choice import Losses

if TYPE_CHECKING:
    from compress.state import State


class Lowbit(TrainingOptions, Pass):
    """Bring the matrices of all blocks to codes of one or two bits; activations stay floats. Made for decoders.

    `ternary` has -1, 0 and 1 with a scale for each row (BitNet b1.58), in two bits; `onebit` signs with a vector for
    rows and one for columns (OneBit). Both are trained through the rounding, by the losses that fit the task or those
    given. What comes out is small, not fast: each call makes floats of the codes. It can't be trained any more.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({TEACHER})
    touches: ClassVar[Part] = Part.VALUES | Part.FORMAT

    method: Literal["ternary", "onebit"] = "ternary"
    learning_rate: float = Field(
        default=5e-4, gt=0, description="its peak; rises over `warmup`, then falls as a cosine to 0"
    )
    dropout: bool = Field(default=False, description="whether the student's dropout is on")
    embeddings: bool = Field(default=False, description="whether embedding tables are trained as well, as floats")
    losses: Losses | None = Field(default=None, description="weight or options of each loss; left out, what fits")
    validation_rows: int = Field(default=512, ge=1, description="rows that a validation looks at, drawn once")

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with its model packed; figures tell the loss without training and with it, and sizes."""
        from compress.lowbit import lowbit_, store_
        from compress.memory import stored_bytes
        from passes.distillation.compare import Comparison
        from passes.distillation.distill import still_tables

        model = state.model
        size = stored_bytes(model)
        skipped = lowbit_(model, state.layout, self.method)
        compare = Comparison(self.losses or Losses.fitting(state.task, labelled=False), state)
        with nullcontext() if self.embeddings else still_tables(compare.student):
            told = compare.train(self, state.workshop.step, "lowbit", self.validation_rows)
        store_(model)
        sizes = {"before": size, "after": stored_bytes(model)}
        state.figures |= {**told, "skipped": skipped, "stored_bytes": sizes}
        yield state
