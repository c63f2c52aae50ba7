"""What masking a head or a group of columns does to all that comes after: the importances of OPTIN.

OPTIN (Khaki & Plataniotis, "The Need for Speed: Pruning Transformers with One Recipe", arXiv:2403.17921) scores a
parameter by how far the features of the later layers, and the output, stray when it is masked. Here a layer's stray is
the squared change of its states relative to their own square, the output's the divergence from the dense logits; the
paper takes a manifold distance of features and weighs the divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import DataError
from compress.layout import Axis, Layout
from compress.progress import track
from compress.statistics import frozen, real_rows
from passes.distillation.losses import logit_kl
from passes.pruning.widths.database import Curve, matrix, projection
from passes.pruning.widths.sensitivity import relative_change, restored
from passes.watch import Batch, Call, answer, blocks_of, real_tokens, watched

Batches = Sequence[Batch]


def trajectory_curves(
    model: PreTrainedModel, layout: Layout, axes: Sequence[Axis], batches: Batches, groups: int
) -> dict[str, Curve]:
    """The curve of each axis by the importances of its units, the least important first, their losses added up.

    Heads are masked one by one. Columns are masked in at most `groups` runs of like magnitude, as masking each alone
    would take too long; a run's importance is shared among its columns by the squares of their magnitudes.
    """
    magnitudes = column_magnitudes(model, layout, [axis for axis in axes if axis.kind == "columns"], batches)
    runs = {axis.name: _runs(axis, magnitudes, groups) for axis in axes}
    masked = [(axis, run) for axis in axes for run in range(len(runs[axis.name]))]
    rows = [len(next(iter(batch.values()))) for batch in batches]
    strays = {axis.name: np.zeros(len(runs[axis.name])) for axis in axes}
    with frozen(model):
        for number, batch in enumerate(batches, 1):
            dense = Dense(model, layout, batch)
            share = rows[number - 1] / sum(rows)
            for axis, run in track(masked, f"mask parts on batch {number} of {len(batches)}", len(masked)):
                with restored(model, [site.module for site in axis.readers]):
                    layout.silence(model, axis.name, runs[axis.name][run].tolist())
                    strays[axis.name][run] += share * dense.stray(axis.block)
    for name, found in strays.items():
        if not np.isfinite(found).all():
            raise DataError(
                f"what masking '{name}' changes is not finite on the calibration text; expected finite states"
            )
    return {name: curve_of(strays[name], runs[name], magnitudes.get(name)) for name in runs}


def curve_of(importances: np.ndarray, runs: Sequence[np.ndarray], magnitudes: np.ndarray | None) -> Curve:
    """The curve under which runs of units go by their `importances` (runs,), and inside a run in the order given.

    The shares of a run's importance go by the squared `magnitudes` (units,), or are alike where there are none.
    """
    order, costs = list[int](), [np.zeros(1)]
    for run in np.argsort(importances, kind="stable"):
        units = runs[run]
        weights = np.ones(len(units)) if magnitudes is None else magnitudes[units] ** 2
        weights = weights if weights.sum() > 0 else np.ones(len(units))
        order += units.tolist()
        costs.append(importances[run] * weights / weights.sum())
    return Curve(tuple(order), np.concatenate(costs).cumsum())


def column_magnitudes(
    model: PreTrainedModel, layout: Layout, axes: Sequence[Axis], batches: Batches
) -> dict[str, np.ndarray]:
    """For each axis the norm of each column's activations times that of the weights that read the column, (units,)."""
    squares: dict[str, Tensor] = {}
    batch: Mapping[str, Tensor] = {}

    def reading(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = real_rows(inputs[0], batch.get("attention_mask"))
            squares[name] = rows.double().square().sum(0).cpu() + squares.get(name, 0.0)

        return hook

    with ExitStack() as hooks, frozen(model):
        for site in (site for axis in axes for site in axis.readers):
            handle = model.get_submodule(site.module).register_forward_pre_hook(reading(site.module))
            hooks.callback(handle.remove)
        for batch in batches:
            answer(model, batch)
    found = {}
    for axis in axes:
        norms = [matrix(projection(model, site)).double().square().sum(0).cpu() for site in axis.readers]
        sums = [squares[site.module] * norm for site, norm in zip(axis.readers, norms, strict=True)]
        found[axis.name] = torch.stack(sums).sum(0).sqrt().numpy()
    return found


class Dense:
    """What a whole model gives on one batch: the states after each block, and the answer."""

    def __init__(self, model: PreTrainedModel, layout: Layout, batch: Batch) -> None:
        self.model, self.layout, self.batch = model, layout, batch
        self.blocks = blocks_of(layout)
        self.states: dict[str, Tensor] = {}
        with watched(model, self.blocks, lambda call: self.states.update({call.block: call.after})):
            self.answer = answer(model, batch)

    def stray(self, block: str) -> float:
        """How far the model, now changed in `block`, strays: the states of all later blocks, and the answer.

        A change that no single block holds strays in all blocks.
        """
        changes = list[Tensor]()

        def see(call: Call) -> None:
            mask = real_tokens(self.layout, call.block, self.batch, call.after)
            changes.append(relative_change(self.states[call.block], call.after, mask).mean())

        later = self.blocks[self.blocks.index(block) + 1 :] if block else self.blocks
        with watched(self.model, later, see):
            found = answer(self.model, self.batch)
        return float(sum(changes)) + float(self.divergence(found))

    def divergence(self, found: Any) -> Tensor:
        """KL divergence of the logits from the dense ones; of models without logits the change of the first output."""
        name = "logits" if "logits" in found else next(iter(found))
        before, after = self.answer[name], found[name]
        mask = real_tokens(self.layout, self.blocks[-1], self.batch, after) if after.ndim == 3 else None
        if name != "logits":
            return relative_change(before, after, mask).mean()
        return logit_kl(after, before, mask).clamp(min=0)  # of next to nothing may be rounded to less than nothing


def _runs(axis: Axis, magnitudes: Mapping[str, np.ndarray], groups: int) -> list[np.ndarray]:
    """The units (indices) that are masked together: a head alone, columns in runs of like magnitude, rising."""
    if axis.name not in magnitudes:
        return list(np.arange(axis.units)[:, None])
    return np.array_split(np.argsort(magnitudes[axis.name], kind="stable"), min(groups, axis.units))
