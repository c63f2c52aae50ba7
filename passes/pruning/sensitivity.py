"""What pruning an axis does to the whole model: a loss curve put on the scale of the model's own output.

Errors of different layers can't be compared: one layer's noise is wiped out by the next norm, another's reaches the
end. So every axis alone is pruned to a few sizes and the change of the last hidden states is measured. Small
independent changes add up, which is what an allocation needs of the numbers it sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.layout import Layout
from compress.progress import track
from compress.statistics import frozen, run_body
from passes.pruning.database import Curve, Fit, silence_

SHARES = (0.5, 0.25, 0.0)  # of an axis' units, measured; what lies between is interpolated
TINY = 1e-12


def measured_losses(
    model: PreTrainedModel,
    layout: Layout,
    curves: Mapping[str, Curve],
    fit: Fit | None,
    batches: Sequence[dict[str, Tensor]],
) -> dict[str, np.ndarray]:
    """For each curve the relative squared error (units + 1,) of the model's last hidden states as its units go.

    The error is averaged over tokens. It is measured at the sizes of `SHARES` and in between follows the curve, on
    logarithmic scales; below the smallest measured one it is proportional to the curve.
    """
    with frozen(model):
        dense = [run_body(model, batch) for batch in batches]
        losses = {}
        for name, curve in track(curves.items(), "measure sensitivity", len(curves)):
            axis = layout.axis(name)
            sizes = sorted({max(axis.least, int(share * axis.units)) for share in SHARES}, reverse=True)
            errors = []
            for size in sizes:
                with restored(model, [site.module for site in axis.readers]):
                    silence_(model, layout, name, curve.kept(size), fit)
                    errors.append(relative_error(model, batches, dense))
            losses[name] = follow(curve.relative, axis.units - np.array(sizes), np.array(errors))
    return losses


def follow(curve: np.ndarray, places: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """A curve (units + 1,) bent to pass through `errors` at `places` (indices, ascending), never falling."""
    known = np.log(np.maximum(curve[places], TINY))
    heights = np.log(np.maximum.accumulate(np.maximum(errors, TINY)))
    asked = np.log(np.maximum(curve, TINY))
    bent = np.interp(asked, known, heights) + np.minimum(asked - known[0], 0)
    return np.where(curve > 0, np.exp(bent), 0.0)


def relative_error(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], dense: Sequence[Tensor]) -> float:
    """Squared change of the last hidden states relative to their own square, meaned over tokens but padding."""
    total, count = 0.0, 0
    for batch, before in zip(batches, dense, strict=True):
        change = relative_change(before, run_body(model, batch), batch.get("attention_mask"))
        total, count = total + float(change.sum()), count + change.numel()
    return total / max(count, 1)


def relative_change(before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
    """Squared change of states (batch, tokens, hidden) relative to their own square, (tokens,) for all but padding.

    A mask of another shape than (batch, tokens) belongs to another stack, and all tokens count.
    """
    change = (after - before).square().sum(-1) / before.square().sum(-1).clamp(min=TINY)
    if mask is not None and mask.shape == change.shape:
        return change[mask.to(change.device).bool()]
    return change.flatten()


@contextmanager
def restored(model: PreTrainedModel, modules: Sequence[str]) -> Iterator[None]:
    """Put the parameters of `modules` back on leaving."""
    parameters = [parameter for name in modules for parameter in model.get_submodule(name).parameters()]
    copies = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
