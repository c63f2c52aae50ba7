"""GPTQ on tensors: weights are rounded input by input, and those still to come make up for the error.

A linear layer ``y = W x`` reads inputs with the Gram matrix ``H = mean(x x^T)``. Rounding column ``j`` of ``W`` to
``q`` errs by ``e = (w_j - q) / U_jj``, where ``U`` is the upper Cholesky factor of ``inv(H)``, and the best that all
later columns can do about it is ``W <- W - e U_j`` (Frantar et al., "GPTQ", 2022, equations 2 and 3 and section 3.3).
``U_jj^2`` is the first entry of the inverse of what is left of ``H``, so the mean squared error of the outputs is in
the end just the sum of ``e^2``.

Columns are taken in blocks: inside one, each rounding is made up for at once, column by column; all that lies beyond
takes the errors of a whole block as one matrix product. Inputs that vary most are rounded first, while most others can
still make up for them; their scales are fixed before, so that groups stay runs of neighbours. Without that order each
group gets its scales when its turn comes, from the weights as they have become.

Weights that are exactly 0 stay so, which keeps a sparse layer sparse, and the others make up for that as well. Weights
of inputs that are never seen become 0. All is done in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.gram import damped, inverse_factor
from passes.quantization.grid import Grid

BLOCK = 128  # columns whose errors the later ones take as one product


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool = False,
    order: bool = True,
    damping: float = 0.01,
) -> tuple[Tensor, Grid, float]:
    """Round a matrix (out, in) to a grid of `bits`, `group` inputs to a scale, making up for errors on the way.

    `gram` (in, in) is that of its inputs, its diagonal raised by `damping` of its mean. Returns the matrix on the grid,
    in float32, the grid, and the mean squared error of the outputs under the damped Gram matrix, summed over them.
    """
    raised = damped(gram, damping)
    left = weight.detach().double()
    left = torch.where(gram.diagonal() == 0, 0.0, left)
    held = left != 0
    grid = Grid.fit(left, bits, group, symmetric)
    turns = raised.diagonal().argsort(descending=True, stable=True) if order else torch.arange(len(raised))
    left, held = left[:, turns].clone(), held[:, turns]
    factor = inverse_factor(raised[turns][:, turns])
    result = torch.empty_like(left, dtype=torch.float32)
    scales, zeros = grid.scale.clone(), grid.zero.clone()
    grid, loss = Grid(scales, zeros, bits, group), 0.0
    step = max(group, BLOCK // group * group) if not order else BLOCK  # a group in turn ends where a block does
    for start in range(0, len(turns), step):
        stop = min(start + step, len(turns))
        errors = left.new_empty(len(left), stop - start)
        for index in range(start, stop):
            place = int(turns[index])
            if not order and place % group == 0:
                renewed = Grid.fit(left[:, place : place + group], bits, group, symmetric)
                scales[:, place // group], zeros[:, place // group] = renewed.scale[:, 0], renewed.zero[:, 0]
            column = left[:, index]
            value = grid.value(grid.codes(column, place), place) * held[:, index]
            error = (column - value) / factor[index, index]
            left[:, index:stop].addr_(error, factor[index, index:stop], alpha=-1)
            result[:, place], errors[:, index - start] = value, error
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        loss += float(errors.square().sum())
    return result, grid, loss
