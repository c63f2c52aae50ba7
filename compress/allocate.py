"""Which size each axis gets: the least loss that fits a budget of milliseconds, by dynamic programming."""

from collections.abc import Sequence

import numpy as np

from compress.errors import ReachError


def solve(losses: Sequence[np.ndarray], times: Sequence[np.ndarray], budget: float, buckets: int = 10_000) -> list[int]:
    """Choose one option per axis so that the times sum to at most `budget` and the losses to as little as possible.

    `losses[i]` and `times[i]` are (options,) of axis i. Time is counted in `buckets` of equal length (SPDY, Frantar &
    Alistarh 2022) and every time rounded *up*: the sum never exceeds the budget, and at most one bucket per axis is
    wasted. Raises ReachError where even the fastest options together take longer than the budget.
    """
    fastest = [int(np.lexsort((loss, time))[0]) for loss, time in zip(losses, times, strict=True)]
    least = sum(float(time[option]) for time, option in zip(times, fastest, strict=True))
    if least > budget:
        raise ReachError(f"no choice of sizes takes {budget:.4g} ms or less; the fastest takes {least:.4g} ms")
    if budget == 0:
        return fastest
    best = np.zeros(buckets + 1)  # best[t]: least loss of the axes so far within t buckets
    chosen = np.zeros((len(losses), buckets + 1), dtype=np.int32)
    ticks = [np.ceil(np.asarray(time) / budget * buckets) for time in times]
    for axis, loss in enumerate(losses):
        reached = np.full(buckets + 1, np.inf)
        for option, tick in enumerate(ticks[axis]):
            if tick > buckets:
                continue
            start = int(tick)
            cost = best[: buckets + 1 - start] + loss[option]
            better = cost < reached[start:]
            reached[start:][better] = cost[better]
            chosen[axis, start:][better] = option
        best = reached
    if not np.isfinite(best[-1]):
        return fastest  # fits by less than what rounding up has added
    left = buckets
    options = []
    for axis in reversed(range(len(losses))):
        options.append(int(chosen[axis, left]))
        left -= int(ticks[axis][options[-1]])
    return options[::-1]
