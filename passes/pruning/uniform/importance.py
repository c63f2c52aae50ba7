"""How much each unit of a model matters, from forward passes alone (Minitron, Muralidharan et al., arXiv:2407.14679).

Activations (batch, tokens, units) are streamed: each row of a batch gives one value per unit, its tokens aggregated by
one statistic, and all rows together one score, by another. What is read, section 2.2 of the paper:

* a head: the norm of its output before the output projection; under grouped queries, that of a whole group;
* a column of a feed-forward layer: the input of the layer's second projection;
* a channel of the residual stream: the outputs of all norms, whose scores are summed;
* a block: how far it turns the stream, ``1 - cos(in, out)`` (Block Influence, arXiv:2403.03853), or what is lost
  without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import DataError

Statistic = Literal["l2", "mean", "variance"]


def per_row(values: Tensor, mask: Tensor | None, statistic: Statistic) -> Tensor:
    """Aggregate activations (batch, tokens, units) over the tokens that `mask` (batch, tokens) calls real.

    ``mean`` is that of magnitudes, as signs would cancel; ``l2`` the root of the sum of squares. Gives (batch, units).
    """
    values = values.float()
    real = torch.ones_like(values[..., :1]) if mask is None else mask.to(values.device)[..., None].float()
    count = real.sum(1).clamp(min=1)
    if statistic == "l2":
        return (values.square() * real).sum(1).sqrt()
    if statistic == "mean":
        return (values.abs() * real).sum(1) / count
    mean = (values * real).sum(1) / count
    return ((values - mean[:, None]).square() * real).sum(1) / count


@dataclass
class Score:
    """The score of each unit over all rows seen, kept as three sums."""

    statistic: Statistic
    rows: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add_(self, values: Tensor) -> None:
        """Take in some rows (batch, units)."""
        values = values.double()
        self.rows += len(values)
        self.total = values.sum(0) + self.total
        self.squares = values.square().sum(0) + self.squares

    def value(self) -> Tensor:
        """The score (units,) in float64: the root of the sum of squares, the mean or the variance over rows."""
        total, squares = torch.as_tensor(self.total), torch.as_tensor(self.squares)
        if not self.rows or not squares.isfinite().all():
            raise DataError("importance: the activations on the calibration text are missing, or not finite")
        if self.statistic == "l2":
            return squares.sqrt().cpu()
        mean = total / self.rows
        return (mean if self.statistic == "mean" else (squares / self.rows - mean.square()).clamp(min=0)).cpu()


def influence(before: Tensor, after: Tensor) -> Tensor:
    """``1 - cos`` of a token's states (..., hidden) before and after a block; (...)."""
    return (1 - functional.cosine_similarity(before.float(), after.float(), dim=-1)).clamp(min=0)


def add_back(units: Tensor, order: Sequence[int], kept: int) -> Tensor:
    """The units (units, ...) where the least important ones kept take in the most important ones removed.

    `order` is from the most to the least important. Of L units K stay, and the i-th of them, for i from 2K - L + 1 to
    K, becomes ``unit_i + (unit_i - unit_{2K - i + 1})`` (section 2.3 of the paper).
    """
    mended = units.clone()
    for distance in range(min(kept, len(order) - kept)):
        mine, theirs = order[kept - 1 - distance], order[kept + distance]
        mended[mine] = 2 * units[mine] - units[theirs]
    return mended
