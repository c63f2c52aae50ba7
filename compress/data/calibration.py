"""Calibration text: the rows that statistics, searches and the ranges of quantization are taken from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from compress.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.data import Data

BATCH = 16


def calibration(data: Data, samples: int, batch_size: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """At most `samples` rows of the calibration split, in batches, shuffled so that they are of all lengths."""
    if not data.count("calibration"):
        raise DataError("calibration needs text, and the plan's data has none in its calibration split")
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
