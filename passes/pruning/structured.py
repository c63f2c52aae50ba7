"""What structured pruning passes share: options, branches, the way from a curve per axis to a model of known speed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from compress.contract import TEACHER, Fact, Part, Pass
from compress.errors import LayoutError

if TYPE_CHECKING:
    import numpy as np

    from compress.layout import Axis
    from compress.measure import Ratio, Timing
    from compress.state import State
    from passes.pruning.database import Curve, Fit
    from passes.pruning.promise import Menu, Sizes

SENSITIVITY_SAMPLES = 64


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


class StructuredPruning(Pass):
    """Cut heads and columns until the model is `speedups` times faster than the dense one, as measured on the target.

    Several speed-ups give a branch each. `kinds` are the axes that may shrink. `prior` is what the search sums up:
    ``sensitivity``, the error of the model's last hidden states, measured for each axis; ``relative``, the error of
    what each axis gives relative to all it gives; ``loss``, that error as it is. The aim lies a share `tolerance` above
    the promise, and at most `max_corrections` further models are built and measured to meet it.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({TEACHER})
    touches: ClassVar[Part] = Part.SHAPE | Part.VALUES
    version: ClassVar[int] = 2

    speedups: tuple[Annotated[float, Field(ge=1)], ...] = Field(min_length=1)
    kinds: tuple[Literal["heads", "columns"], ...] = Field(default=("heads", "columns"), min_length=1)
    prior: Literal["sensitivity", "relative", "loss"] = "sensitivity"
    max_corrections: int = Field(default=3, ge=0)
    tolerance: float = Field(default=0.01, ge=0, lt=1)

    _distinct = field_validator("speedups")(distinct)

    @property
    def branches(self) -> tuple[str, ...]:
        """One model per speed-up, named after it where there are several."""
        return named_after(self.speedups)

    def curves(self, state: State, axes: Sequence[Axis]) -> tuple[dict[str, Curve], Fit | None]:
        """The curve of each axis by name, and how the weights that stay are refitted, if they are."""
        raise NotImplementedError

    def choice(self, menu: Menu) -> Callable[[float], Sizes]:
        """How sizes are chosen for a budget of milliseconds."""
        return menu.search

    def run(self, state: State) -> Iterator[State]:
        """Yield one cut model per speed-up; its figures tell what was promised, predicted and measured."""
        from compress.families import layout_of
        from passes.pruning.database import cut_to
        from passes.pruning.promise import pursue

        axes = [axis for axis in state.layout.axes.values() if axis.kind in self.kinds and axis.units > axis.least]
        if not axes:
            raise LayoutError(f"nothing of kind {' or '.join(self.kinds)} is left to cut in this model")
        curves, fit = self.curves(state, axes)
        menu = _menu(state, axes, self.losses(state, curves, fit))
        as_dense = state.layout == layout_of(state.dense.model)
        dense, present = timed(state, None if as_dense else state)

        def trial(sizes: Sizes) -> Ratio:
            from compress.measure import speedup

            return speedup(*timed(state, cut_to(state, curves, sizes, fit)))

        for faster in self.speedups:
            promise = pursue(
                faster, menu, self.choice(menu), trial,
                dense.milliseconds, present.milliseconds, self.max_corrections, self.tolerance,
            )  # fmt: skip
            branch = cut_to(state, curves, promise.best.sizes, fit)
            branch.figures = {"dense_milliseconds": dense.milliseconds, **promise.figures()}
            yield branch

    def losses(self, state: State, curves: Mapping[str, Curve], fit: Fit | None) -> dict[str, np.ndarray]:
        """For each axis the loss (units + 1,) once so many units have gone, as `prior` says."""
        if self.prior == "loss":
            return {name: curve.losses for name, curve in curves.items()}
        if self.prior == "relative":
            return {name: curve.relative**0.5 for name, curve in curves.items()}
        from passes.pruning.calibrate import calibration
        from passes.pruning.sensitivity import measured_losses

        batches = list(calibration(state.data, SENSITIVITY_SAMPLES))
        return measured_losses(state.model, state.layout, curves, fit, batches)


def _menu(state: State, axes: Sequence[Axis], losses: Mapping[str, np.ndarray]) -> Menu:
    """Sizes and times as the target's latency table gives them, with the losses of those sizes."""
    import numpy as np

    from compress.latency import table
    from compress.runtimes import example_inputs
    from passes.pruning.promise import Menu

    inputs = example_inputs(state.model, state.tokenizer, state.target.batch, state.target.sequence)
    measured = table(state.model, state.layout, state.target, inputs, state.workshop.run / "latency")
    sizes = {
        axis.name: sorted({axis.units, *(n for n in measured.sizes(axis.name) if axis.least <= n <= axis.units)})
        for axis in axes
    }
    times = {name: np.array([measured.milliseconds(name, size) for size in offer]) for name, offer in sizes.items()}
    return Menu(sizes, {axis.name: losses[axis.name][axis.units - np.array(sizes[axis.name])] for axis in axes}, times)


def timed(state: State, other: State | None) -> tuple[Timing, Timing]:
    """Time the dense model and another in turn; without another, the dense model stands for both."""
    from compress.measure import measure

    if other is None:
        (dense,) = measure([state.dense_artifact()], state.target)
        return dense, dense
    folder = state.workshop.step / "candidate"
    state.build(other.model, folder)
    dense, candidate = measure([state.dense_artifact(), folder], state.target)
    shutil.rmtree(folder)
    return dense, candidate
