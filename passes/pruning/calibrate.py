"""Calibrate: read what the prunable projections read, on text the model was made for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.contract import STATISTICS, Fact, Pass
from compress.data.calibration import BATCH, calibration

if TYPE_CHECKING:
    from compress.state import State


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
