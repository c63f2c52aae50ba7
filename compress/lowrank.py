"""Low-rank deltas on linear layers: ``W x + B A x`` with an A and a B of the layer's own, where W may be shared.

A layer becomes the subclass of its kind that adds the delta: its weight keeps its name, and whoever looks for a linear
layer still finds one. LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LowRank(nn.Module):
    """Adds ``scale up down x`` to what the layer gives; `down` is (rank, in), `up` (out, rank)."""

    down: nn.Parameter
    up: nn.Parameter
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its delta; (..., in) -> (..., out)."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.down), self.up)


class LowRankLinear(LowRank, nn.Linear):
    """A `Linear` with a delta."""


class LowRankConv1D(LowRank, Conv1D):
    """A `Conv1D` with a delta; its own weight is (in, out)."""


KINDS: dict[type[nn.Module], type[LowRank]] = {nn.Linear: LowRankLinear, Conv1D: LowRankConv1D}


def add_deltas_(block: nn.Module, rank: int) -> None:
    """Give every linear layer of a block a delta."""
    for module in list(block.modules()):
        if type(module) in KINDS:
            add_delta_(module, rank)


def add_delta_(layer: nn.Module, rank: int, scale: float = 1.0) -> None:
    """Give a linear layer a delta that is zero at first: `down` is normal, `up` zeros."""
    weight: Tensor = layer.weight  # type: ignore[assignment]  # torch types every attribute as tensor or module
    kind = KINDS[type(layer)]
    outputs, inputs = weight.shape if kind is LowRankLinear else weight.T.shape
    layer.down = nn.Parameter(weight.new_empty(rank, inputs).normal_(std=inputs**-0.5))
    layer.up = nn.Parameter(weight.new_zeros(outputs, rank))
    layer.__class__ = kind
    if scale != 1:
        layer.scale = scale  # type: ignore[assignment]


@torch.no_grad()
def merge_delta_(layer: LowRank) -> None:
    """Make the delta part of the weight, and the layer what it was."""
    delta = layer.scale * (layer.up @ layer.down)
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    weight.data = weight + (delta if isinstance(layer, LowRankLinear) else delta.T)  # its memory may be another's too
    layer.__class__ = next(plain for plain, kind in KINDS.items() if kind is type(layer))  # type: ignore[assignment]
    del layer.down, layer.up
    vars(layer).pop("scale", None)
