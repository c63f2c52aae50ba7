"""What structured pruning passes share: options, branches, the way from a curve per axis to a model of known speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compress.contract import TEACHER, Fact, Part, Pass
from compress.errors import LayoutError, ReachError
from passes.pruning.speedups import distinct, each, named_after, timed, timed_as_given

if TYPE_CHECKING:
    import numpy as np

    from compress.latency import Table
    from compress.layout import Axis
    from compress.measure import Ratio
    from compress.state import State
    from passes.pruning.promise import Menu, Sizes
    from passes.pruning.search.choice import Choice
    from passes.pruning.search.fitness import Fitness
    from passes.pruning.widths.database import Curve, Fit

SENSITIVITY_SAMPLES, SENSITIVITY_TOKENS = 64, 2048  # whichever is met first
SEARCH_BATCH = 8  # small, as evolution judges by few batches first


class StructuredPruning(Pass):
    """Cut heads and columns until the model is `speedups` times faster than the dense one, as measured on the target.

    Several speed-ups give a branch each. With `parameters` in their place the model is to be small, and no time is
    measured. `prior` is the loss of each axis at each size: ``sensitivity``, the error of
    the model's last hidden states, measured for each axis; ``relative``, the error of what each axis gives relative to
    all it gives; ``loss``, that error as it is. `search` chooses the sizes: ``prior`` takes those whose losses sum to
    the least. Losses of single axes don't quite add up, so the others look at the whole pruned model, at its last
    hidden states or, of a language model, its predictions: ``spdy`` learns a coefficient for each axis' losses,
    ``evolution`` breeds sizes.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({TEACHER})
    touches: ClassVar[Part] = Part.SHAPE | Part.VALUES
    version: ClassVar[int] = 4

    speedups: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        default=(), description="times faster than the dense model, a branch each"
    )
    parameters: float | None = Field(
        default=None, gt=0, lt=1, description="share of the parameters outside of embeddings and head that may stay"
    )
    kinds: tuple[Literal["heads", "columns"], ...] = Field(
        default=("heads", "columns"), min_length=1, description="the axes that may shrink"
    )
    prior: Literal["sensitivity", "relative", "loss"] = Field(
        default="sensitivity", description="the loss of each axis at each size"
    )
    search: Literal["prior", "spdy", "evolution"] = Field(
        default="prior", description="sizes by the summed prior, or by a search that judges the whole pruned model"
    )
    search_samples: int = Field(default=64, ge=1, description="rows of calibration text that a search judges by")
    search_trials: int = Field(
        default=100, ge=1, description="spdy: random coefficients to begin with, and failures in a row that end a round"
    )
    generations: int = Field(
        default=50, ge=1, description="evolution: generations, of four evaluations by all samples each"
    )
    seed: int = Field(default=0, ge=0, description="of all that is drawn at random")
    max_corrections: int = Field(
        default=3, ge=0, description="further models built and measured at most, to meet the promise"
    )
    tolerance: float = Field(
        default=0.01, ge=0, lt=1, description="share above the promise that is aimed at, so that noise won't break it"
    )

    _distinct = field_validator("speedups")(distinct)

    @model_validator(mode="after")
    def _one_budget(self) -> StructuredPruning:
        if bool(self.speedups) == (self.parameters is not None):
            met = "both" if self.speedups else "neither"
            raise ValueError(f"{met} given; expected one of speedups and parameters")
        return self

    @property
    def branches(self) -> tuple[str, ...]:
        """One model per speed-up, named after it where there are several."""
        return named_after(self.speedups)

    def curves(self, state: State, axes: Sequence[Axis]) -> tuple[dict[str, Curve], Fit | None]:
        """The curve of each axis by name, and how the weights that stay are refitted, if they are."""
        raise NotImplementedError

    def choice(self, menu: Menu, fitness: Fitness | None) -> Choice:
        """How sizes are chosen for a budget of milliseconds; a search starts from those of the summed prior."""
        from passes.pruning.search.choice import Choice, Evolution, Spdy

        if fitness is None:
            return Choice(menu, menu.search)
        if self.search == "spdy":
            return Spdy(menu, menu.search, fitness, self.search_trials, self.seed)
        return Evolution(menu, menu.search, fitness, self.generations, self.seed)

    def fitness(self, state: State, curves: Mapping[str, Curve], fit: Fit | None) -> Fitness | None:
        """What a search judges sizes by; None where there is no search."""
        from compress.data.calibration import calibration
        from passes.pruning.search.fitness import Fitness
        from passes.pruning.widths.sensitivity import HIDDEN, PREDICTIONS

        if self.search == "prior":
            return None
        batches = list(calibration(state.data, self.search_samples, SEARCH_BATCH))
        output = PREDICTIONS if state.task.packs else HIDDEN
        return Fitness(state.model, state.layout, curves, fit, batches, output)

    def run(self, state: State) -> Iterator[State | ReachError]:
        """Yield one cut model per speed-up; its figures tell what was promised, predicted and measured."""
        from passes.pruning.promise import pursue
        from passes.pruning.widths.database import cut_to

        axes = [axis for axis in state.layout.axes.values() if axis.kind in self.kinds and axis.units > axis.least]
        if not axes:
            raise LayoutError(f"nothing of kind {' or '.join(self.kinds)} is left to cut in this model")
        curves, fit = self.curves(state, axes)
        losses, fitness = self.losses(state, curves, fit), self.fitness(state, curves, fit)
        if self.parameters is not None:
            small = _small_menu(state, axes, losses)
            yield from each((self.parameters,), lambda share: self._smaller(share, state, small, curves, fit, fitness))
            return
        menu = _menu(state, axes, losses)
        dense, present = timed_as_given(state)

        def trial(sizes: Sizes) -> Ratio:
            from compress.measure import speedup

            return speedup(*timed(state, lambda: cut_to(state, curves, sizes, fit)))

        def faster(times: float) -> State:
            choice = self.choice(menu, fitness)
            promise = pursue(
                times, menu, choice, trial,
                dense.milliseconds, present.milliseconds, self.max_corrections, self.tolerance, choice.loss,
            )  # fmt: skip
            sizes = promise.best.sizes
            branch = cut_to(state, curves, sizes, fit)
            branch.figures = {"dense_milliseconds": dense.milliseconds, **promise.figures(), **choice.figures(sizes)}
            return branch

        yield from each(self.speedups, faster)

    def _smaller(
        self,
        share: float,
        state: State,
        menu: Menu,
        curves: Mapping[str, Curve],
        fit: Fit | None,
        fitness: Fitness | None,
    ) -> State:
        """The branch that keeps a share of the parameters; its figures tell which it kept."""
        from passes.pruning.amounts import counted
        from passes.pruning.widths.database import cut_to

        whole, choice = counted(state.model), self.choice(menu, fitness)
        fixed = whole - menu.cost({name: max(sizes) for name, sizes in menu.sizes.items()})
        try:
            sizes = choice(share * whole - fixed)
        except ReachError as error:
            least = (menu.cost(menu.fastest()) + fixed) / whole
            raise ReachError(
                f"a share of {share:g} of the parameters is out of reach; the smallest sizes keep {least:.3g}"
            ) from error
        branch = cut_to(state, curves, sizes, fit)
        branch.figures = {"kept": counted(branch.model) / whole, "sizes": dict(sizes), **choice.figures(sizes)}
        return branch

    def losses(self, state: State, curves: Mapping[str, Curve], fit: Fit | None) -> dict[str, np.ndarray]:
        """For each axis the loss (units + 1,) once so many units have gone, as `prior` says."""
        if self.prior == "loss":
            return {name: curve.losses for name, curve in curves.items()}
        if self.prior == "relative":
            return {name: curve.relative**0.5 for name, curve in curves.items()}
        from compress.data.calibration import calibration, up_to
        from passes.pruning.widths.sensitivity import measured_losses

        batches = calibration(state.data, SENSITIVITY_SAMPLES, SEARCH_BATCH)
        return measured_losses(state.model, state.layout, curves, fit, list(up_to(SENSITIVITY_TOKENS, batches)))


def _menu(state: State, axes: Sequence[Axis], losses: Mapping[str, np.ndarray]) -> Menu:
    """Sizes and times as the target's latency table gives them, with the losses of those sizes."""
    import numpy as np

    from passes.pruning.promise import Menu

    measured, names = _table(state)
    sizes = {
        axis.name: sorted({axis.units, *(n for n in measured.sizes(names[axis.name]) if axis.least <= n <= axis.units)})
        for axis in axes
    }
    times = {
        name: np.array([measured.milliseconds(names[name], size) for size in offer]) for name, offer in sizes.items()
    }
    return Menu(sizes, _at(sizes, axes, losses), times)


def _small_menu(state: State, axes: Sequence[Axis], losses: Mapping[str, np.ndarray]) -> Menu:
    """Sizes and the parameters they take, with the losses of those sizes."""
    import numpy as np

    from compress.latency import levels
    from passes.pruning.amounts import of_one_unit
    from passes.pruning.promise import Menu

    sizes = {axis.name: levels(axis) for axis in axes}
    taken = {axis.name: of_one_unit(state.model, axis) * np.array(sizes[axis.name], dtype=float) for axis in axes}
    return Menu(sizes, _at(sizes, axes, losses), taken)


def _at(
    sizes: Mapping[str, Sequence[int]], axes: Sequence[Axis], losses: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """For each axis the losses at its sizes, of all losses (units + 1,) by the number of units gone."""
    return {axis.name: losses[axis.name][[axis.units - size for size in sizes[axis.name]]] for axis in axes}


def _table(state: State) -> tuple[Table, Mapping[str, str]]:
    """The latency table for a model, and the name in it of each axis.

    It is the dense model's where that has the same axes, if larger ones: a model cut before would be measured anew for
    every width that its blocks have come to.
    """
    from compress.families import layout_of
    from compress.latency import table
    from compress.runtimes import example_inputs
    from compress.state import dense_name

    inputs = example_inputs(state.model, state.tokenizer, state.target.batch, state.target.sequence)
    folder = state.workshop.run / "latency"
    layout, dense = state.layout, layout_of(state.dense.model)
    names = {name: dense_name(name, state.model) for name in layout.axes}
    if all(old in dense.axes and _form(layout.axes[new]) == _form(dense.axes[old]) for new, old in names.items()):
        return table(state.dense.model, dense, state.target, inputs, folder), names
    return table(state.model, layout, state.target, inputs, folder), {name: name for name in layout.axes}


def _form(axis: Axis) -> tuple[object, ...]:
    """What two axes have in common if one is the other cut: all but the units, if its time is its own."""
    its_own = axis.kind in ("heads", "columns")  # the time of any other width is spread over all that it runs through
    return axis.kind, None if its_own else axis.units, [(site.dim, site.width) for site in axis.sites]
