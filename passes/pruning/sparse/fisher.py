"""The Optimal BERT Surgeon on tensors: what weights cost the loss by its curvature, and how the others make up for it.

Kurtic et al., "The Optimal BERT Surgeon", 2022 (arXiv:2203.07259). The curvature is the empirical Fisher matrix
``F = d + mean(g g^T)`` of gradients ``g``, of which the diagonal blocks are kept: a matrix (out, in) is read row by row
and cut into blocks of `size` weights, (blocks, size); all blocks are computed at once. Removing the weights ``Q`` costs
``w_Q inv(inv(F)_QQ) w_Q / 2`` and the others of the block become ``w - inv(F)_:Q inv(inv(F)_QQ) w_Q`` (equations 5, 6).
"""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.pruning.sparse.pattern import Pattern


def blocked(matrix: Tensor, size: int) -> Tensor:
    """The entries of a matrix, or of several (..., out, in), in blocks: (..., blocks, size), zeros behind the last."""
    rows = matrix.flatten(-2)
    return F.pad(rows, (0, -rows.shape[-1] % size)).unflatten(-1, (-1, size))


def unblocked(blocks: Tensor, like: Tensor) -> Tensor:
    """The matrix (out, in) of its blocks."""
    return blocks.flatten()[: like.numel()].view_as(like)


def inverse_fisher(blocks: int, size: int, damping: float, like: Tensor) -> Tensor:
    """The inverse of a Fisher matrix without a gradient yet, (blocks, size, size)."""
    return torch.eye(size, dtype=like.dtype, device=like.device).div(damping).repeat(blocks, 1, 1)


def add_gradients_(inverse: Tensor, gradients: Tensor, count: int) -> None:
    """Add gradients (several, blocks, size), of `count` that there are in all, to an inverse Fisher matrix in place.

    By the identity of Woodbury, several at once: ``P - P G inv(count + G^T P G) G^T P``; one alone is equation 4.
    """
    columns = gradients.movedim(0, -1)  # (blocks, size, several)
    pulled = inverse @ columns
    inner = columns.mT @ pulled
    inner.diagonal(dim1=-2, dim2=-1).add_(count)
    inverse.baddbmm_(pulled, torch.linalg.solve(inner, pulled.mT), alpha=-1)


def candidates(weight: Tensor, inverse: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """What may go next in each run, and what that costs: (blocks, runs, run) booleans and (blocks, runs).

    A run is one weight, or the neighbours of the pattern's block, which go together; or so many as N:M counts, of which
    those go that cost least of all choices.
    """
    run, gone = pattern.run, round(pattern.sparsity * pattern.of) or pattern.run
    runs = weight.unflatten(1, (-1, run))  # (blocks, runs, run)
    squares = inverse.unflatten(2, (-1, run)).unflatten(1, (-1, run)).diagonal(dim1=1, dim2=3)
    squares = squares.movedim(-1, 1)  # (blocks, runs, run, run)
    costs, choices = [], [list(choice) for choice in combinations(range(run), gone)]
    for choice in choices:
        part, square = runs[..., choice], squares[..., choice, :][..., choice]
        force = part / square[..., 0] if len(choice) == 1 else torch.linalg.solve(square, part)
        costs.append((part * force).sum(-1) / 2)
    least, index = torch.stack(costs).min(0)
    table = torch.zeros(len(choices), run, dtype=torch.bool, device=weight.device)
    for row, choice in enumerate(choices):
        table[row, choice] = True
    return table[index], least


def without(weight: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """The weights (blocks, size) once those that are `gone` are zero and the others of their block make up for them.

    All that go from a block do so together, which is the least that they can cost; the paper adds up what each run
    alone would ask of the others. Solved in float64.
    """
    weight, inverse = weight.double(), inverse.double()
    system = inverse * (gone[:, :, None] & gone[:, None, :])
    system.diagonal(dim1=1, dim2=2).add_((~gone).double())
    force = torch.linalg.solve(system, weight * gone)
    return (weight - (inverse @ force[..., None])[..., 0]).masked_fill(gone, 0.0)
