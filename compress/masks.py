"""Masks: which weights of a model are zero and stay so, by parameter name; true where a weight may be other than zero.

Masks are in the form of the parameter as it is stored. Whoever trains masks gradients: a weight that is zero and gets
no gradient has no moments either, so that AdamW, weight decay and averages all leave it exactly where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Masks = Mapping[str, Tensor]


def inside(masks: Masks, prefix: str) -> dict[str, Tensor]:
    """The masks of a part of the model, whose parameters' names lack the `prefix`."""
    return {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}


def mask_gradients_(masked: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Take away the gradients of masked weights, given parameters with their masks."""
    for parameter, mask in masked:
        if parameter.grad is not None:
            parameter.grad.mul_(mask)


@torch.no_grad()
def zeros(model: nn.Module, masks: Masks) -> dict[str, Any]:
    """What a report tells of masked weights, counted: how many there are, their share, and those found other than 0.

    A matrix that several layers share is counted once.
    """
    held = {name: model.get_parameter(name) for name in masks}
    gone = sum(int((~mask).sum()) for mask in masks.values())
    filled = {name: int((held[name][~mask.to(held[name].device)] != 0).sum()) for name, mask in masks.items()}
    return {
        "masked": gone,
        "share": gone / max(1, sum(mask.numel() for mask in masks.values())),
        "filled": {name: count for name, count in filled.items() if count},
    }
