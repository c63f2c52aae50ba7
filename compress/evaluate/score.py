"""Scores: a value with its confidence interval, by bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.evaluate.metrics import Columns, Measure

RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """A score with its 95 % confidence interval, and the number of rows or sequences that it was taken over."""

    value: float
    low: float
    high: float
    count: int


def bootstrap(measure: Measure, columns: Columns, resamples: int = RESAMPLES, seed: int = 0) -> Score:
    """Return a measure of the rows, with the 2.5 and 97.5 percentiles of it over seeded resamples (Efron 1979).

    Resamples on which the measure isn't defined (a correlation of equal values) are left out.
    """
    random = np.random.default_rng(seed)
    count = len(next(iter(columns.values())))
    value = measure(columns)
    draws = (random.integers(count, size=count) for _ in range(resamples))
    values = [measure({name: column[draw] for name, column in columns.items()}) for draw in draws]
    defined = [one for one in values if np.isfinite(one)] or [value]
    low, high = np.percentile(defined, [2.5, 97.5])
    return Score(float(value), float(min(low, value)), float(max(high, value)), count)
