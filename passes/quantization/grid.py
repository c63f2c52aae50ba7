"""Grids: the values that quantized weights may take, ``scale * (code - zero)`` with codes of a few bits.

A matrix (out, in) has a scale and a zero for each row and each group of `group` inputs that follow one another. Zero is
a code, so the value 0 lies on every grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Scales (out, groups) in float32, zeros (out, groups) as codes, and how many bits a code has."""

    scale: Tensor
    zero: Tensor
    bits: int
    group: int

    @classmethod
    def fit(cls, weight: Tensor, bits: int, group: int, symmetric: bool) -> Grid:
        """The grid of a matrix (out, in) whose ends are the least and the greatest weight of each group, and 0.

        A `symmetric` grid reaches as far below 0 as above, its zero being the middle code.
        """
        groups = [part.float() for part in weight.split(group, dim=1)]
        low = torch.stack([part.amin(1) for part in groups], 1).clamp(max=0)
        high = torch.stack([part.amax(1) for part in groups], 1).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = (high - low) / (2**bits - 1)
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
        return cls(scale, zero, bits, group)

    def codes(self, column: Tensor, index: int) -> Tensor:
        """The nearest codes (out,) of one column (out,) of the matrix, that of input `index`."""
        scale, zero = self.scale[:, index // self.group], self.zero[:, index // self.group]
        return (column / scale).round().add(zero).clamp(0, 2**self.bits - 1)

    def value(self, codes: Tensor, index: int) -> Tensor:
        """The values (out,), in float32, of the codes of one column."""
        return (codes.float() - self.zero[:, index // self.group]) * self.scale[:, index // self.group]

    def nearest(self, weight: Tensor) -> Tensor:
        """The matrix (out, in) with every weight at the nearest value of the grid."""
        steps, zero = (part.repeat_interleave(self.group, 1)[:, : weight.shape[1]] for part in (self.scale, self.zero))
        codes = (weight.float() / steps).round().add(zero).clamp(0, 2**self.bits - 1)
        return (codes - zero) * steps
