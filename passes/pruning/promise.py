"""Keep a promised speed-up: choose sizes from a table of times, measure the model they make, correct, choose again.

A latency table adds up times of modules measured alone, and the whole model takes more or less: a little where the
machine is quiet, much where it was busy when the table was made. So each attempt is measured, and the next one's budget
lies on the straight line between the two measured models next to the aim, whatever the table says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.allocate import solve
from compress.errors import ReachError

if TYPE_CHECKING:
    from compress.measure import Ratio

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Menu:
    """What each axis offers: its sizes in ascending order and, for each size, a loss and a cost.

    Costs are milliseconds where speed is promised, else parameters.
    """

    sizes: Mapping[str, Sequence[int]]
    losses: Mapping[str, np.ndarray]
    costs: Mapping[str, np.ndarray]

    def search(self, budget: float) -> Sizes:
        """The sizes of least summed loss that cost at most `budget`; raises ReachError if none do."""
        names = list(self.sizes)
        options = solve([self.losses[name] for name in names], [self.costs[name] for name in names], budget)
        return {name: self.sizes[name][option] for name, option in zip(names, options, strict=True)}

    def weighted(self, coefficients: Sequence[float] | np.ndarray) -> Menu:
        """The menu with the losses of each axis multiplied by its coefficient (axes,)."""
        weights = zip(self.sizes, coefficients, strict=True)
        return replace(self, losses={name: weight * self.losses[name] for name, weight in weights})

    def uniform(self, budget: float) -> Sizes:
        """The largest share, kept alike of every axis, that costs at most `budget`; raises ReachError if none does."""
        shares = {size / max(sizes) for sizes in self.sizes.values() for size in sizes}
        for share in sorted(shares, reverse=True):
            sizes = {name: self._nearest_below(name, share) for name in self.sizes}
            if self.cost(sizes) <= budget:
                return sizes
        raise ReachError(f"no share kept alike of every axis costs {budget:.4g} or less")

    def fastest(self) -> Sizes:
        """The sizes that cost least."""
        return {name: sizes[int(np.argmin(self.costs[name]))] for name, sizes in self.sizes.items()}

    def cost(self, sizes: Sizes) -> float:
        """What all axes cost at the given sizes."""
        return sum(float(self.costs[name][self.sizes[name].index(size)]) for name, size in sizes.items())

    def loss(self, sizes: Sizes) -> float:
        """Summed loss at the given sizes."""
        return sum(float(self.losses[name][self.sizes[name].index(size)]) for name, size in sizes.items())

    def _nearest_below(self, name: str, share: float) -> int:
        sizes = self.sizes[name]
        return max((size for size in sizes if size <= share * max(sizes)), default=min(sizes))


@dataclass(frozen=True)
class Attempt:
    """One choice of sizes: its loss, and how many times faster than the dense model it was thought to be and is."""

    sizes: Sizes
    loss: float
    predicted: float
    measured: float
    low: float
    high: float


@dataclass(frozen=True)
class Promise:
    """A promised speed-up and what was tried to keep it."""

    speedup: float
    attempts: Sequence[Attempt]

    @property
    def best(self) -> Attempt:
        """The attempt of least loss among those that keep the promise; the fastest where none does."""
        kept = [attempt for attempt in self.attempts if attempt.measured >= self.speedup]
        if kept:
            return min(kept, key=lambda attempt: attempt.loss)
        return max(self.attempts, key=lambda attempt: attempt.measured)

    @property
    def met(self) -> bool:
        """Whether the best attempt keeps the promise as measured."""
        return self.best.measured >= self.speedup

    def figures(self) -> dict[str, Any]:
        """What a report tells of it, as JSON values."""
        best, missed = asdict(self.best), []
        if not self.met:
            missed.append(f"{self.speedup:g}x was promised; the fastest model found measured {self.best.measured:.3g}x")
        attempts = [asdict(attempt) for attempt in self.attempts]
        return {"promised": self.speedup, "met": self.met, **best, "attempts": attempts, "warnings": missed}


@dataclass
class Clock:
    """Milliseconds that a model takes, by what its sizes cost on the menu.

    Between two of the measured `points` (cost, milliseconds) time is a straight line; beyond them it goes by `rate`.
    """

    rate: float
    points: list[tuple[float, float]]

    def milliseconds(self, cost: float) -> float:
        """The time to be expected at a cost."""
        costs, times = self._line()
        beyond = min(cost - costs[0], 0.0) + max(cost - costs[-1], 0.0)
        return float(np.interp(cost, costs, times)) + self.rate * beyond

    def cost(self, milliseconds: float) -> float:
        """The cost at which that time is to be expected."""
        costs, times = self._line()
        beyond = min(milliseconds - times[0], 0.0) + max(milliseconds - times[-1], 0.0)
        return float(np.interp(milliseconds, times, costs)) + beyond / self.rate

    def _line(self) -> tuple[np.ndarray, np.ndarray]:
        """The points by rising cost; noise is kept from letting times fall."""
        costs, times = np.array(sorted(self.points)).T
        return costs, np.maximum.accumulate(times)


def pursue(
    speedup: float,
    menu: Menu,
    choose: Callable[[float], Sizes],
    trial: Callable[[Sizes], Ratio],
    dense: float,
    present: float,
    corrections: int,
    tolerance: float,
    loss: Callable[[Sizes], float] | None = None,
) -> Promise:
    """Choose and try sizes until the model is `speedup` times faster than the dense one, and hardly faster than that.

    `dense` and `present` are milliseconds of the dense model and of the one that will be cut. `choose` gives sizes
    that fit a budget of milliseconds, `trial` builds and measures them. The aim lies a share `tolerance` above the
    promise, so that noise doesn't break it. `loss` judges sizes, by the menu if it is left out. Raises ReachError if
    by table and by measurement no sizes are fast enough; if only a measurement says so, the promise may end up missed.
    """
    whole = menu.cost({name: max(sizes) for name, sizes in menu.sizes.items()})
    # A table can't be right that tells more than the whole model takes.
    clock = Clock(min(1.0, present / whole), [(whole, present)])
    fastest, attempts = menu.fastest(), list[Attempt]()

    def attempt(sizes: Sizes) -> Attempt:
        """Try sizes, and know their time from then on."""
        cost = menu.cost(sizes)
        expected, ratio, lost = clock.milliseconds(cost), trial(sizes), (loss or menu.loss)(sizes)
        clock.points.append((cost, dense / ratio.value))
        attempts.append(Attempt(dict(sizes), lost, dense / expected, ratio.value, ratio.low, ratio.high))
        return attempts[-1]

    if speedup * clock.milliseconds(menu.cost(fastest)) > dense:
        # The machine may have been slow for a moment, so the table's word is put to the test before it is passed on.
        best = attempt(fastest)
        if best.high < speedup:
            raise ReachError(
                f"a speed-up of {speedup:g}x is out of reach on this target; "
                f"the fastest sizes measure {best.measured:.3g}x",
                best.measured,
            )

    def within(budget: float) -> Sizes:
        try:
            return choose(budget)
        except ReachError:
            return fastest

    for _ in range(1 + corrections):
        sizes = within(clock.cost(dense / (speedup * (1 + tolerance))))
        if any(tried.sizes == sizes and tried.measured < speedup for tried in attempts):
            sizes = within(float(np.nextafter(menu.cost(sizes), -np.inf)))  # the next below it
        if any(tried.sizes == sizes for tried in attempts):
            break
        if speedup <= attempt(sizes).measured <= speedup * (1 + 3 * tolerance):
            break
    return Promise(speedup, attempts)
