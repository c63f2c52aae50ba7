"""How each axis of a model may shrink: the order in which its units go, what that costs, and the weights that stay.

No weights are stored. Those of any size come from the dense weights and the Gram matrices, since removing units one by
one and compensating each time is the same as one least-squares fit on the units that stay.

A reader with a bias has one more input, the constant 1, which is never removed: the bias takes in the mean of what
went. Fitting both is fitting the weights to the covariance ``H - mean mean^T`` and setting the bias afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.contract import STATISTICS
from compress.errors import DataError
from compress.layout import Axis, Layout, Site
from compress.progress import track
from compress.state import State
from passes.pruning.widths.obs import least_squares, removal_order


@dataclass(frozen=True)
class Curve:
    """One axis: the `order` (units,) in which its units go and the `losses` (units + 1,) once so many have gone.

    By optimal removal a loss is the mean squared error, per token, of what the axis' readers give.
    """

    order: tuple[int, ...]
    losses: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """Losses as shares of the last, from 0 to 1; an axis that gives nothing loses nothing."""
        return self.losses / self.losses[-1] if self.losses[-1] > 0 else np.zeros_like(self.losses)

    def kept(self, size: int) -> list[int]:
        """The units that stay when `size` of them do."""
        return sorted(self.order[len(self.order) - size :])


@dataclass(frozen=True)
class Fit:
    """Refits the readers of an axis to the units that stay, from what they read in calibration."""

    statistics: Mapping[str, Any]
    damping: float

    def moments(self, site: Site, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Second moments (in, in) of what `weight` reads at `site`, and the mean (in,) in float64."""
        gram, mean = self.statistics.get(f"{site.module}.gram"), self.statistics.get(f"{site.module}.mean")
        inputs = weight.shape[1]
        if gram is None or mean is None or len(gram) != inputs:
            met = "nothing" if gram is None else f"{len(gram)} inputs"
            raise DataError(f"the statistics hold {met} for '{site.module}'; expected {inputs} inputs: calibrate anew")
        return gram.to(weight.device), mean.to(weight.device, torch.float64)

    def centred(self, site: Site, module: nn.Linear) -> Tensor:
        """Second moments (in, in) of what a module reads at `site` in float64, about the mean if it has a bias."""
        gram, mean = self.moments(site, matrix(module))
        gram = gram.to(torch.float64, copy=True)
        return gram if module.bias is None else gram.addr_(mean, mean, alpha=-1)

    def refit_(self, model: PreTrainedModel, site: Site, kept: Tensor) -> None:
        """Change, in place, the weights that read the inputs `kept`, and the bias, to make up for the other inputs."""
        module = projection(model, site)
        old = matrix(module)
        gram, mean = self.moments(site, old)
        new = least_squares(old, gram, kept, self.damping, None if module.bias is None else mean)
        with torch.no_grad():
            if module.bias is not None:
                module.bias.add_(old.double() @ mean - new.double() @ mean[kept])
            old[:, kept] = new

    def curve(self, model: PreTrainedModel, axis: Axis) -> Curve:
        """The curve of an axis where each time the cheapest unit goes and all others make up for it."""
        modules = [projection(model, site) for site in axis.readers]
        weights = [matrix(module) for module in modules]
        moments = [self.centred(site, module) for site, module in zip(axis.readers, modules, strict=True)]
        order, losses = removal_order(weights, moments, axis.readers[0].width, self.damping)
        return Curve(tuple(order.tolist()), losses.cpu().numpy())


def surgery(state: State, axes: Sequence[Axis], damping: float) -> tuple[dict[str, Curve], Fit]:
    """The curves of the axes under optimal removals, and the fit that makes them true."""
    fit = Fit(state.facts[STATISTICS.name], damping)
    return {axis.name: fit.curve(state.model, axis) for axis in track(axes, "order removals", len(axes))}, fit


def by_magnitude(model: PreTrainedModel, axis: Axis) -> Curve:
    """The curve of an axis by the squared norm of the weights that read each unit, the smallest first."""
    norms = torch.zeros(axis.units, dtype=torch.float64)
    for site in axis.readers:
        columns = matrix(projection(model, site)).double().cpu().square().sum(0)
        norms += columns.view(axis.units, site.width).sum(1)
    norms, order = norms.sort()
    return Curve(tuple(order.tolist()), np.concatenate([[0.0], norms.cumsum(0).numpy()]))


def by_chance(axis: Axis, generator: np.random.Generator) -> Curve:
    """The curve of an axis in random order, where every unit counts the same."""
    return Curve(tuple(generator.permutation(axis.units).tolist()), np.linspace(0, 1, axis.units + 1))


def silence_(model: PreTrainedModel, layout: Layout, name: str, kept: list[int], fit: Fit | None) -> None:
    """Zero, in place, what reads the units that don't stay; with `fit` the readers' other weights make up for it."""
    axis = layout.axis(name)
    if fit is not None:
        for site in axis.readers:
            fit.refit_(model, site, axis.positions(site, kept).to(projection(model, site).weight.device))
    layout.silence(model, name, sorted(set(range(axis.units)) - set(kept)))


def cut_to(state: State, curves: Mapping[str, Curve], sizes: Mapping[str, int], fit: Fit | None) -> State:
    """A branch of the state whose axes are cut to `sizes`, with readers refitted if there is a `fit`."""
    branch = state.branch()
    for name, size in sizes.items():
        if size < state.layout.axis(name).units:
            kept = curves[name].kept(size)
            for site in branch.layout.axis(name).readers:
                own_(projection(branch.model, site))
            silence_(branch.model, branch.layout, name, kept, fit)
            branch.cut(name, kept)
    return branch


def own_(module: nn.Module) -> None:
    """Give a module parameters of its own in place of those that it shares with another model's."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def projection(model: PreTrainedModel, site: Site) -> nn.Linear:
    """The module at a site; a Conv1D has the same attributes."""
    return cast("nn.Linear", model.get_submodule(site.module))


def matrix(module: nn.Linear) -> Tensor:
    """The weight of a projection in the view (out, in), whatever the storage, and detached from it."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight
