"""Patterns: where zeros may lie in a matrix (out, in), and which ones by the score of every weight.

Scores are what a weight costs when it goes: never negative and, for runs of weights, summed; 0 for one that is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """So large a share of zeros: wherever they cost least, or in runs of `block` inputs that go together.

    With `of` there are as many in each run of so many inputs: N:M, where N of M stay.
    """

    sparsity: float
    block: int = 1
    of: int = 0

    @property
    def run(self) -> int:
        """Inputs that are looked at together; a matrix has to have a multiple of them."""
        return self.of or self.block

    def at(self, sparsity: float) -> Pattern:
        """The same with another share of zeros."""
        return replace(self, sparsity=sparsity)

    def kept(self, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Which weights stay, as booleans (out, in), by scores (out, in), exactly so many as the pattern says.

        Weights compete within their run for N:M; else over the whole matrix, or with `by_row` within their row.
        """
        if self.of:
            return _without_lowest(scores.unflatten(1, (-1, self.of)), round(self.sparsity * self.of)).flatten(1)
        runs = scores.unflatten(1, (-1, self.block)).sum(-1)
        field = runs if by_row else runs.reshape(1, -1)
        kept = _without_lowest(field, round(self.sparsity * field.shape[1]))
        return kept.view_as(runs).repeat_interleave(self.block, 1)


def _without_lowest(scores: Tensor, count: int) -> Tensor:
    """True but for the `count` lowest along the last dimension; of equal ones the first go."""
    order = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order, False)
