"""What passes that are given budgets share: checks, names of branches, times against the dense model, a model each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from compress.contract import VOCABULARY
from compress.errors import ReachError

if TYPE_CHECKING:
    from compress.measure import Timing
    from compress.state import State

Budget = TypeVar("Budget")


def distinct(speedups: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Refuse a speed-up that is listed twice."""
    given = speedups or ()
    repeated = sorted({f"{speedup:g}" for speedup in given if given.count(speedup) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is listed more than once; expected each speed-up once")
    return speedups


def named_after(speedups: Sequence[float]) -> tuple[str, ...]:
    """Names of the branches of several speed-ups; a single one goes on under the name it had."""
    return tuple(f"{speedup:g}x" for speedup in speedups) if len(speedups) > 1 else ("",)


def each(budgets: Iterable[Budget], make: Callable[[Budget], State]) -> Iterator[State | ReachError]:
    """The model of each budget, or why there is none: one out of reach does not keep the others from being made."""
    for budget in budgets:
        try:
            found: State | ReachError = make(budget)
        except ReachError as missed:
            found = missed
        yield found


def timed_as_given(state: State) -> tuple[Timing, Timing]:
    """Time the dense model and the one that a pass was given, which may be the dense one still."""
    from compress.families import layout_of

    as_dense = state.layout == layout_of(state.dense.model) and VOCABULARY.name not in state.facts
    return timed(state, None if as_dense else lambda: state)


def timed(state: State, other: Callable[[], State] | None) -> tuple[Timing, Timing]:
    """Time the dense model and another in turn; without another, the dense model stands for both.

    The other is made when it is needed and let go before it is timed: its artifact takes memory enough.
    """
    from compress.measure import measure

    if other is None:
        (dense,) = measure([state.dense_artifact()], state.target)
        return dense, dense
    folder = state.workshop.step / "candidate"
    state.build(other().model, folder)
    dense, candidate = measure([state.dense_artifact(), folder], state.target)
    shutil.rmtree(folder)
    return dense, candidate
