"""SPDY: learn how much the loss of each axis counts, by trying what the dynamic program makes of it.

Losses of single axes don't add up to the loss of a model pruned in all of them. So each axis gets a coefficient that
its losses are multiplied by, the dynamic program gives the sizes that are best for these products, and the loss of the
whole model at those sizes says what the coefficients are worth (Frantar & Alistarh, "SPDY", 2022, section 3.2). The
budget is kept by every candidate, as the program keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from compress.progress import track
from passes.pruning.search.best import Best

SHARE = 0.1  # of the coefficients, drawn anew at once when the local search begins
Solution = TypeVar("Solution")


def learn_coefficients(
    solve: Callable[[np.ndarray], Solution],
    fitness: Callable[[Solution], float],
    axes: int,
    trials: int,
    seed: int,
) -> Best[np.ndarray]:
    """The coefficients (axes,) between 0 and 1 whose solution has the lowest fitness.

    Begins with the best of `trials` random vectors and of all ones, which is the program as it is: so the search never
    ends worse than that. Then a tenth of the coefficients, ever fewer down to one, are drawn anew and kept where that
    is strictly better, until `trials` draws in a row were not. What `solve` raises goes through.
    """
    generator = np.random.default_rng(seed)
    equal = np.ones(axes)
    best = Best(equal, fitness(solve(equal)))
    for _ in track(range(trials), "spdy: random coefficients", trials):
        coefficients = generator.random(axes)
        best.offer(coefficients, fitness(solve(coefficients)))
    for count in range(max(1, round(SHARE * axes)), 0, -1):
        _resample(solve, fitness, best, count, trials, generator)
    return best


def _resample(
    solve: Callable[[np.ndarray], Solution],
    fitness: Callable[[Solution], float],
    best: Best[np.ndarray],
    count: int,
    trials: int,
    generator: np.random.Generator,
) -> None:
    """Draw `count` of the best coefficients anew until `trials` draws in a row were no better."""
    begun = best.tried
    unlucky = iter(lambda: best.tried - max(begun, best.history[-1][0]) < trials, False)
    for _ in track(unlucky, f"spdy: {count} coefficients anew"):
        coefficients = best.value.copy()
        coefficients[generator.integers(len(coefficients), size=count)] = generator.random(count)
        best.offer(coefficients, fitness(solve(coefficients)))
