"""Evolution of sizes: children differ from their parent by switched levels, and ever fewer are judged on ever more.

No loss of a single axis is asked for, as such losses need not add up, nor even rank, models pruned in all axes
(Sieberling et al., "EvoPress", 2024; Tang et al., "DarwinLM", 2025). A child has one axis a level higher and others so
much lower that the time still fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from compress.progress import track
from passes.pruning.search.best import Best

MOST_SWITCHES = 3
Levels = tuple[int, ...]


def evolve(
    start: Levels,
    times: Sequence[np.ndarray],
    budget: float,
    fitness: Callable[[Levels, float], float],
    generations: int,
    offspring: int,
    seed: int,
) -> Best[Levels]:
    """The levels of lowest fitness met, one per axis; at ``times[i][level]`` they sum to at most `budget`.

    Times rise with the level, and `start` must fit. ``fitness(levels, share)`` judges by a share of the samples: of n
    children all are judged by 1/n, the better half of them by twice as much, until one is left to be compared with its
    parent by all.
    """
    generator = np.random.default_rng(seed)
    best = Best(start, fitness(start, 1.0))
    for _ in track(range(generations), "evolution", generations):
        drawn = [switched(best.value, times, budget, generator) for _ in range(offspring)]
        children = [child for child in dict.fromkeys(drawn) if child is not None and child != best.value]
        while len(children) > 1:
            children = sorted(children, key=_by(fitness, 1 / len(children)))[: len(children) // 2]
        for child in children:
            best.offer(child, fitness(child, 1.0))
    return best


def switched(
    levels: Levels, times: Sequence[np.ndarray], budget: float, generator: np.random.Generator
) -> Levels | None:
    """A child: one to three times, mostly once, an axis goes a level up and others down; None where nothing can."""
    child = levels
    for _ in range(int(generator.integers(1, MOST_SWITCHES + 1, size=2).min())):
        open_ = [axis for axis, level in enumerate(child) if level + 1 < len(times[axis])]
        if not open_:
            return None
        risen = int(generator.choice(open_))
        fit = fitted(_moved(child, risen, 1), times, budget, generator, held=risen)
        if fit is None:
            return None
        child = fit
    return child


def fitted(
    levels: Levels, times: Sequence[np.ndarray], budget: float, generator: np.random.Generator, held: int | None = None
) -> Levels | None:
    """The levels with random axes but `held` lowered until their time fits, then raised by what is left over.

    None where they don't fit at their lowest.
    """
    while _total(levels, times) > budget:
        lower = [axis for axis, level in enumerate(levels) if level and axis != held]
        if not lower:
            return None
        levels = _moved(levels, int(generator.choice(lower)), -1)
    for axis in generator.permutation(len(levels)).tolist():
        while levels[axis] + 1 < len(times[axis]) and _total(_moved(levels, axis, 1), times) <= budget:
            levels = _moved(levels, axis, 1)
    return levels


def _by(fitness: Callable[[Levels, float], float], share: float) -> Callable[[Levels], float]:
    """The fitness by one share of the samples."""
    return lambda levels: fitness(levels, share)


def _moved(levels: Levels, axis: int, by: int) -> Levels:
    """The levels with one axis moved."""
    return (*levels[:axis], levels[axis] + by, *levels[axis + 1 :])


def _total(levels: Levels, times: Sequence[np.ndarray]) -> float:
    """The time at the given levels."""
    return sum(float(time[level]) for time, level in zip(times, levels, strict=True))
