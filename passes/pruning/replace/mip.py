"""Which variant each sub-block gets under several budgets at once: a mixed-integer program, solved exactly by HiGHS.

One binary x for each variant of each sub-block, with a score and an amount of every resource:

    minimise    sum score * x
    subject to  sum x = 1                   for each sub-block
                sum amount * x <= limit     for each resource
                sum y * x <= alpha * L      for each previous solution y, of L sub-blocks

(Puzzle, arXiv:2411.19146, section 4.) A dynamic program holds one budget; this holds any number. A throughput of at
least `t` tokens a second at a batch and sequence is the limit ``1000 * batch * sequence / t`` on milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from compress.errors import ReachError
from passes.pruning.promise import Menu, Sizes

Table = Sequence[np.ndarray]  # for each sub-block one number per variant, (variants,)
GAP = 1e-9  # relative, between the choice found and the best there can be


def choose(
    scores: Table,
    resources: Mapping[str, Table],
    limits: Mapping[str, float],
    previous: Sequence[Sequence[int]] = (),
    alpha: float = 0.8,
) -> list[int]:
    """The variant of each sub-block, by number, of least summed score within the `limits` of those `resources`.

    Of each of the `previous` choices at most a share `alpha` of the sub-blocks comes again. A limit is met to within
    a ten-millionth of the largest amount. Raises ReachError where no choice meets all.
    """
    starts = np.cumsum([0, *(len(row) for row in scores)])
    for name, limit in limits.items():
        least = sum(float(row.min()) for row in resources[name])
        if least > limit * (1 + GAP) + GAP:
            raise ReachError(f"{name}: {limit:.4g} at most was asked; the least that any choice takes is {least:.4g}")
    blocks = np.repeat(np.arange(len(scores)), np.diff(starts))
    each = csr_array((np.ones(starts[-1]), (blocks, np.arange(starts[-1]))))
    constraints = [LinearConstraint(each, 1, 1)]
    for name, limit in limits.items():
        amounts = np.concatenate(resources[name])
        scale = max(float(np.abs(amounts).max()), abs(limit), np.finfo(float).tiny)
        constraints.append(LinearConstraint(amounts / scale, -np.inf, limit / scale))
    for choice in previous:
        again = np.zeros(starts[-1])
        again[starts[:-1] + np.asarray(choice)] = 1
        constraints.append(LinearConstraint(again, -np.inf, np.floor(alpha * len(scores) + GAP)))
    costs = np.concatenate(scores)
    costs = costs / max(float(np.abs(costs).max()), np.finfo(float).tiny)
    found = milp(
        costs, integrality=np.ones_like(costs), bounds=Bounds(0, 1), constraints=constraints,
        options={"mip_rel_gap": GAP},
    )  # fmt: skip
    if found.x is None:
        asked = ", ".join(f"{name} at most {limit:.4g}" for name, limit in limits.items())
        apart = f" that differs from {len(previous)} others" if previous else ""
        raise ReachError(f"no choice of variants{apart} meets all of: {asked}")
    return [int(np.argmax(found.x[start:end])) for start, end in pairwise(starts)]


@dataclass(frozen=True)
class Search(Menu):
    """A menu of variants by number whose every choice keeps further `limits`, and differs from the `previous` ones.

    The sizes of the menu are the numbers of the variants, the whole one's the last. `resources` hold, by name, what
    each variant of each axis takes.
    """

    resources: Mapping[str, Mapping[str, np.ndarray]]
    limits: Mapping[str, float]
    alpha: float
    previous: tuple[Sizes, ...] = ()

    def best(self) -> Sizes:
        """The choice of least score within the limits; raises ReachError where there is none."""
        return self._choose(self.losses, {}, {})

    def search(self, budget: float) -> Sizes:
        """That choice among those that take at most `budget` milliseconds; raises ReachError where there is none."""
        return self._choose(self.losses, {"milliseconds": self.costs}, {"milliseconds": budget})

    def fastest(self) -> Sizes:
        """The choice that takes the least time within the limits; raises ReachError where there is none."""
        return self._choose(self.costs, {}, {})

    def apart_from(self, choice: Sizes) -> Search:
        """The search whose next choice also differs from this one."""
        return replace(self, previous=(*self.previous, choice))

    def amounts(self, choice: Sizes) -> dict[str, float]:
        """What a choice takes of each resource."""
        return {
            name: sum(float(table[axis][index]) for axis, index in choice.items())
            for name, table in self.resources.items()
        }

    def _choose(
        self, costs: Mapping[str, np.ndarray], more: Mapping[str, Mapping[str, np.ndarray]], limits: Mapping[str, float]
    ) -> Sizes:
        names = list(self.sizes)
        resources = {name: [table[axis] for axis in names] for name, table in {**self.resources, **more}.items()}
        previous = [[choice[axis] for axis in names] for choice in self.previous]
        picked = choose([costs[axis] for axis in names], resources, {**self.limits, **limits}, previous, self.alpha)
        return dict(zip(names, picked, strict=True))
