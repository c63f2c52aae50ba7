"""Prune: what ZipLM is compared with, under the same options and the same measured promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from compress.contract import STATISTICS, TEACHER, Fact
from passes.pruning.widths.structured import StructuredPruning

if TYPE_CHECKING:
    from compress.layout import Axis
    from compress.state import State
    from passes.pruning.promise import Menu
    from passes.pruning.search.choice import Choice
    from passes.pruning.search.fitness import Fitness
    from passes.pruning.widths.database import Curve, Fit


class Prune(StructuredPruning):
    """Remove units by a plain `criterion`, sharing the budget among the axes by `allocation`.

    ``magnitude`` takes the units read with the smallest weights, ``random`` any (by `seed`); what stays is left as it
    is. ``obs`` removes and refits as ZipLM does. ``uniform`` keeps the same share of every axis, ``search`` the sizes
    that `search` finds.
    """

    criterion: Literal["magnitude", "random", "obs"] = "magnitude"
    allocation: Literal["uniform", "search"] = "uniform"
    damping: float = Field(default=0.01, gt=0, le=1)

    @model_validator(mode="after")
    def _searches_if_told_how(self) -> Prune:
        if self.allocation == "uniform" and self.search != "prior":
            raise ValueError(f"search: {self.search} needs allocation: search; met allocation: uniform")
        return self

    @property
    def requires(self) -> frozenset[Fact]:  # type: ignore[override]
        """Statistics are for ``obs`` alone."""
        return frozenset({STATISTICS, TEACHER}) if self.criterion == "obs" else frozenset({TEACHER})

    def curves(self, state: State, axes: Sequence[Axis]) -> tuple[dict[str, Curve], Fit | None]:
        """The curves by the criterion; only ``obs`` refits."""
        import numpy as np

        from passes.pruning.widths.database import by_chance, by_magnitude, surgery

        if self.criterion == "obs":
            return surgery(state, axes, self.damping)
        if self.criterion == "magnitude":
            return {axis.name: by_magnitude(state.model, axis) for axis in axes}, None
        generator = np.random.default_rng(self.seed)
        return {axis.name: by_chance(axis, generator) for axis in axes}, None

    def choice(self, menu: Menu, fitness: Fitness | None) -> Choice:
        """One share for all, or the search."""
        from passes.pruning.search.choice import Choice

        return Choice(menu, menu.uniform) if self.allocation == "uniform" else super().choice(menu, fitness)
