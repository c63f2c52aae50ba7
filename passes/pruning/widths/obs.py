"""Structured Optimal Brain Surgeon on tensors: in which order units go, what it costs, and what the rest becomes.

A linear layer ``y = W x`` with ``W`` of shape (out, in) reads inputs whose second moments are the Gram matrix
``H = mean(x x^T)``. A *unit* is a run of `width` inputs. Its removal, with the best compensation by all inputs that
stay, costs ``tr(W_S inv(P_SS) W_S^T)`` of mean squared output error, where ``P = inv(H)`` (Hassibi & Stork 1993; in
this form Kurtic et al., "ZipLM", 2023); then

    W <- W - W_S inv(P_SS) P_S         P <- P - P_S^T inv(P_SS) P_S

and the next cheapest unit is looked for. Two facts keep this small and fast:

* Removing units one by one, each optimally, ends at the joint least-squares optimum over the kept inputs. So no weights
  are kept on the way: `least_squares` gives those of any size later, from the Gram matrix alone.
* A score needs only the diagonal blocks of ``P`` and of ``W^T W``. These follow every removal exactly; ``W`` and ``P``
  themselves take the removals in batches, as matrix products, and shrink to the living units each time. A needed row
  is mended on demand. Cost O(units^2 * (units + out)) as plain removal, but bound by arithmetic and not by memory.

All is done in float64: the running inverse loses digits with every removal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.gram import damped

BATCH = 64  # removed inputs that may wait before W and P take them in


def removal_order(
    weights: Sequence[Tensor], grams: Sequence[Tensor], width: int, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Remove all units of an axis one by one, the cheapest first.

    `weights` are the matrices (out, units * width) that read the axis, `grams` the (units * width, units * width)
    second moments of what each reads; their costs add up. Returns the units in order of removal (units,), and the
    summed mean squared error of all readers after each removal (units + 1,), which starts at 0 and ends at
    ``tr(W H W^T)``; ``H`` is the damped Gram matrix. Raises `torch.linalg.LinAlgError` where that isn't positive
    definite.
    """
    readers = [_Reader(weight, gram, width, damping) for weight, gram in zip(weights, grams, strict=True)]
    alive = torch.arange(weights[0].shape[1] // width, device=weights[0].device)
    order, costs = [], []
    while len(alive):
        gone: list[int] = []
        for _ in range(min(len(alive), max(1, BATCH // width))):
            scores = torch.stack([reader.scores() for reader in readers]).sum(0)
            scores[gone] = torch.inf
            cost, unit = scores.min(0)
            gone.append(int(unit))
            costs.append(float(cost))
            for reader in readers:
                reader.remove(gone[-1])
        order.append(alive[gone])
        kept = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        kept[gone] = False
        alive = alive[kept]
        for reader in readers:
            reader.settle(kept)
    return torch.cat(order), torch.tensor([0.0, *costs], dtype=torch.float64).cumsum(0)


def least_squares(
    weight: Tensor, gram: Tensor, kept: Tensor, damping: float = 0.01, mean: Tensor | None = None
) -> Tensor:
    """The weights (out, len(kept)) that, reading only the inputs `kept`, come nearest to ``W x``.

    Minimises ``tr((W_K - W) H (W_K - W)^T)`` for the damped Gram matrix ``H``: ``W_K = W H_{:,K} inv(H_KK)``. With the
    `mean` (in,) of the inputs, ``H`` is taken about it. Only the columns that are read are held in float64.
    """
    columns, diagonal = gram[:, kept].double(), gram.diagonal().double()
    if mean is not None:
        columns.addr_(mean, mean[kept], alpha=-1)
        diagonal = diagonal - mean.square()
    damped = torch.where(diagonal == 0, 1.0, diagonal + damping * diagonal.mean())
    columns[kept, torch.arange(len(kept), device=kept.device)] = damped[kept]
    factor = torch.linalg.cholesky(columns[kept])
    return torch.cholesky_solve((weight.double() @ columns).T, factor).T.to(weight.dtype)


class _Reader:
    """One matrix and the inverse of its Gram matrix under removals, the latest of which still wait.

    With ``A = inv(P_SS) P_S`` of each waiting removal stacked to (waiting, in), the present matrices are
    ``W - W_S A`` and ``P - P_S^T A``.
    """

    def __init__(self, weight: Tensor, gram: Tensor, width: int, damping: float) -> None:
        self.width = width
        self.weight = weight.detach().double().clone()
        self.weight[:, gram.diagonal() == 0] = 0.0
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping)))
        self._start()

    def _start(self) -> None:
        """Read the diagonal blocks (units, width, width) afresh, with nothing waiting."""
        size, width = self.inverse.shape[0], self.width
        units, room = size // width, max(BATCH, width)
        self.waiting = 0
        self.solved = self.inverse.new_empty(room, size)
        self.rows = self.inverse.new_empty(room, size)
        self.columns = self.weight.new_empty(self.weight.shape[0], room)
        blocks = self.inverse.view(units, width, units, width)
        self.inverse_blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        columns = self.weight.view(len(self.weight), units, width).permute(1, 2, 0)
        self.norm_blocks = torch.bmm(columns, columns.mT)

    def scores(self) -> Tensor:
        """What the removal of each unit would cost now, (units,); of no meaning for units removed already."""
        if self.width == 1:
            return (self.norm_blocks / self.inverse_blocks).flatten().clamp(min=0)
        factors = torch.linalg.cholesky(self.inverse_blocks)
        solved = torch.cholesky_solve(self.norm_blocks, factors)
        return solved.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0)

    def remove(self, unit: int) -> None:
        """Take the unit out of all scores; `settle` takes it out of the matrices."""
        width, old = self.width, self.waiting
        here, new = slice(unit * width, (unit + 1) * width), slice(old, old + width)
        solved, rows, columns = self.solved[:old], self.rows[:old], self.columns[:, :old]
        row = self.inverse[here] - rows[:, here].T @ solved
        column = self.weight[:, here] - columns @ solved[:, here]
        ratio = torch.cholesky_solve(row, torch.linalg.cholesky(row[:, here]))
        products = column.T @ self.weight - (column.T @ columns) @ solved
        products -= 0.5 * (column.T @ column) @ ratio
        self.rows[new], self.solved[new], self.columns[:, new] = row, ratio, column
        self.waiting += width
        row, ratio, products = (x.view(width, -1, width).transpose(0, 1) for x in (row, ratio, products))
        self.inverse_blocks -= row.mT @ ratio
        change = ratio.mT @ products
        self.norm_blocks -= change + change.mT
        self.inverse_blocks[unit] = torch.eye(width)

    def settle(self, kept: Tensor) -> None:
        """Apply the waiting removals and forget the removed units; `kept` is a mask (units,)."""
        held = kept.repeat_interleave(self.width).nonzero().flatten()
        solved, rows = self.solved[: self.waiting, held], self.rows[: self.waiting, held]
        self.weight = self.weight[:, held].addmm_(self.columns[:, : self.waiting], solved, alpha=-1)
        self.inverse = self.inverse[held][:, held].addmm_(rows.T, solved, alpha=-1)
        self._start()
