"""Calibrate: read what the prunable projections read, on text the model was made for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.contract import STATISTICS, Fact, Pass
from compress.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.data import Data
    from compress.state import State

BATCH = 16


class Calibrate(Pass):
    """Gather the Gram matrices that pruning decides by, over `samples` texts of the calibration split."""

    provides: ClassVar[frozenset[Fact]] = frozenset({STATISTICS})

    samples: int = Field(default=512, ge=1)
    batch_size: int = Field(default=BATCH, ge=1)

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with the statistics set; the model stays as it is."""
        from compress.progress import track
        from compress.statistics import moments

        readers = sorted({site.module for axis in state.layout.axes.values() if axis.units for site in axis.readers})
        batches = list(calibration(state.data, self.samples, self.batch_size))
        facts = moments(state.model, readers, track(batches, "calibrate", len(batches)))
        state.give(STATISTICS, facts)
        samples = sum(len(batch["input_ids"]) for batch in batches)
        state.figures = {"samples": samples, "tokens": max(facts[f"{name}.count"] for name in readers)}
        yield state


def calibration(data: Data, samples: int, batch_size: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """At most `samples` rows of the calibration split, in batches, shuffled so that they are of all lengths."""
    if not data.count("calibration"):
        raise DataError("pruning needs calibration text, and the plan's data has none in its calibration split")
    left = samples
    for batch in data.batches("calibration", batch_size, seed=0):
        yield {name: value[:left] for name, value in batch.items()}
        left -= len(next(iter(batch.values())))
        if left <= 0:
            return


def up_to(tokens: int, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The first batches, until they hold so many tokens, padding not counted; inputs without a mask count as one."""
    for batch in batches:
        yield batch
        tokens -= int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(next(iter(batch.values())))
        if tokens <= 0:
            return
