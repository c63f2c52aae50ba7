"""How sizes are chosen for a budget, again and again as the budget is corrected: by a rule, or by a search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from passes.pruning.promise import Menu, Sizes
from passes.pruning.search.best import Best
from passes.pruning.search.evolution import Levels, evolve, fitted
from passes.pruning.search.fitness import Fitness
from passes.pruning.search.spdy import learn_coefficients

OFFSPRING = 8  # by halves three times, so that a generation costs four evaluations by all samples
RESTART = 4  # a search that goes on from a found answer, for a corrected budget, is so much shorter


@dataclass
class Choice:
    """Sizes by a rule that needs no search; what is lost is what the menu says."""

    menu: Menu
    rule: Callable[[float], Sizes]

    def __call__(self, budget: float) -> Sizes:
        """Sizes that cost at most `budget`; raises ReachError where there are none."""
        return self.rule(budget)

    def loss(self, sizes: Sizes) -> float:
        """What is lost at the given sizes."""
        return self.menu.loss(sizes)

    def figures(self, sizes: Sizes) -> dict[str, Any]:
        """What a report tells of the search that has ended at `sizes`, as JSON values."""
        return {}


@dataclass
class Searched(Choice):
    """Sizes by a search that looks at the whole pruned model; `rule` is what it starts from and is compared with."""

    fitness: Fitness
    length: int
    seed: int
    answers: list[Best[Any]] = field(default_factory=list)

    def loss(self, sizes: Sizes) -> float:
        """The fitness of the given sizes."""
        return self.fitness(sizes)

    def figures(self, sizes: Sizes) -> dict[str, Any]:
        """Fitness of the sizes, how many were tried, and for each budget the way: [trial, fitness] of each new best."""
        return {
            "fitness": self.fitness(sizes),
            "fitness_history": [[list(step) for step in answer.history] for answer in self.answers],
            "tried": sum(answer.tried for answer in self.answers),
        }


@dataclass
class Spdy(Searched):
    """Coefficients of the losses, learnt once; a corrected budget is solved for with the same."""

    def __call__(self, budget: float) -> Sizes:
        """The least summed product of coefficient and loss within the budget."""
        if not self.answers:
            learnt = learn_coefficients(
                lambda coefficients: self.menu.weighted(coefficients).search(budget),
                self.fitness, len(self.menu.sizes), self.length, self.seed,
            )  # fmt: skip
            self.answers.append(learnt)
        return self.menu.weighted(self.answers[0].value).search(budget)

    def figures(self, sizes: Sizes) -> dict[str, Any]:
        """The coefficients as well."""
        learnt = {
            name: float(coefficient)
            for answer in self.answers
            for name, coefficient in zip(self.menu.sizes, answer.value, strict=True)
        }
        return {**super().figures(sizes), "coefficients": learnt}


@dataclass
class Evolution(Searched):
    """Sizes that evolve from the rule's; for a corrected budget they evolve further from the last."""

    def __call__(self, budget: float) -> Sizes:
        """The fittest sizes met within the budget."""
        start, generations = self._levels(self.rule(budget)), self.length
        if self.answers:
            last = fitted(self.answers[-1].value, self._costs, budget, np.random.default_rng(self.seed))
            start = min(start, last or start, key=lambda levels: self._fitness(levels, 1.0))
            generations = -(-generations // RESTART)
        self.answers.append(evolve(start, self._costs, budget, self._fitness, generations, OFFSPRING, self.seed))
        return self._sizes(self.answers[-1].value)

    @property
    def _costs(self) -> list[np.ndarray]:
        return [self.menu.costs[name] for name in self.menu.sizes]

    def _fitness(self, levels: Levels, share: float) -> float:
        return self.fitness(self._sizes(levels), share)

    def _levels(self, sizes: Sizes) -> Levels:
        return tuple(self.menu.sizes[name].index(sizes[name]) for name in self.menu.sizes)

    def _sizes(self, levels: Levels) -> Sizes:
        return {name: sizes[level] for (name, sizes), level in zip(self.menu.sizes.items(), levels, strict=True)}
