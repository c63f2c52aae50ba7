"""Low-rank deltas on linear layers: ``W x + B A x`` with an A and a B of the layer's own, where W may be shared.

A layer becomes the subclass of its kind that adds the delta: its weight keeps its name, and whoever looks for a linear
layer still finds one. LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LowRank(nn.Module):
    """Adds ``up down x`` to what the layer gives; `down` is (rank, in), `up` (out, rank)."""

    down: nn.Parameter
    up: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its delta; (..., in) -> (..., out)."""
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class LowRankLinear(LowRank, nn.Linear):
    """A `Linear` with a delta."""


class LowRankConv1D(LowRank, Conv1D):
    """A `Conv1D` with a delta; its own weight is (in, out)."""


KINDS: dict[type[nn.Module], type[LowRank]] = {nn.Linear: LowRankLinear, Conv1D: LowRankConv1D}


def add_deltas_(block: nn.Module, rank: int) -> None:
    """Give every linear layer of a block a delta that is zero at first: `down` is normal, `up` zeros."""
    for module in list(block.modules()):
        kind = KINDS.get(type(module))
        if kind is None:
            continue
        weight: Tensor = module.weight  # type: ignore[assignment]  # torch types every attribute as tensor or module
        outputs, inputs = weight.shape if kind is LowRankLinear else weight.T.shape
        module.down = nn.Parameter(weight.new_empty(rank, inputs).normal_(std=inputs**-0.5))
        module.up = nn.Parameter(weight.new_zeros(outputs, rank))
        module.__class__ = kind
