"""Magnitude, Wanda and SparseGPT on tensors: a matrix (out, in) and the Gram matrix of its inputs give a sparse one.

A linear layer ``y = W x`` reads inputs with the Gram matrix ``H = mean(x x^T)``. Removing column entry ``j`` of a row
costs ``w_j^2 / inv(H)_jj`` if all others make up for it, the least that it can cost; ``w_j^2 H_jj`` if none does, by
which Wanda chooses (Sun et al., arXiv:2306.11695, section 3; |w| times the norm of the input, squared).

SparseGPT (Frantar & Alistarh, arXiv:2301.00774, section 3) takes columns from left to right and lets those still to
come make up. With ``U`` the upper Cholesky factor of ``inv(H)``, ``U_jj^2`` is the first entry of the inverse of what
is left of ``H``: entry ``j`` costs ``e^2``, ``e = w_j / U_jj``, and later columns become ``W - e U_j``. Of a run ``Q``
of columns that go together the cost is ``|w_Q inv(U_QQ)|^2``. So the squared error of the outputs is in the end the
sum of ``e^2``.

Every function takes `held`, booleans (out, in), or None: entries that are false are gone already and stay so. Returned
is the weight in its own dtype, with zeros, and which of its entries are held. All is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.gram import damped, inverse_factor
from passes.pruning.sparse.pattern import Pattern

BLOCK = 128  # columns that are chosen among, and whose errors the later ones take as one product

Sparse = tuple[Tensor, Tensor]


def magnitude(weight: Tensor, gram: Tensor, pattern: Pattern, held: Tensor | None = None) -> Sparse:
    """Keep the largest weights of the matrix; the inputs play no part."""
    return _masked(weight, pattern.kept(_without(weight.double().square(), held)), held)


def wanda(weight: Tensor, gram: Tensor, pattern: Pattern, held: Tensor | None = None) -> Sparse:
    """Keep in each row the largest weights times the norms of their inputs; what stays is left as it is."""
    scores = weight.double().square() * gram.diagonal().double()
    return _masked(weight, pattern.kept(_without(scores, held), by_row=True), held)


def sparsegpt(
    weight: Tensor, gram: Tensor, pattern: Pattern, held: Tensor | None = None, *, damping: float = 0.01
) -> Sparse:
    """Remove weights column by column, those to the right making up for it.

    Zeros are chosen within blocks of `BLOCK` columns, so that each has the pattern's share; N:M within each run once
    it is reached. The diagonal of `gram` is raised by `damping` of its mean.
    """
    factor = inverse_factor(damped(gram, damping))
    left = torch.where(gram.diagonal() == 0, 0.0, weight.detach().double())
    kept = torch.ones_like(left, dtype=torch.bool) if held is None else held.clone()
    width = left.shape[1]
    step = BLOCK // pattern.run * pattern.run or pattern.run
    for start in range(0, width, step):
        stop = min(start + step, width)
        errors = left.new_empty(len(left), stop - start)
        chosen = pattern.run if pattern.of else stop - start  # columns that are chosen among at once
        for index in range(start, stop):
            if (index - start) % chosen == 0:
                part = slice(index, index + chosen)
                scores = costs(left[:, part], factor[part, part], pattern)
                kept[:, part] &= pattern.kept(_without(scores, kept[:, part]))
            error = left[:, index] * ~kept[:, index] / factor[index, index]
            left[:, index:stop].addr_(error, factor[index, index:stop], alpha=-1)
            errors[:, index - start] = error
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return (left * kept).to(weight.dtype), kept


def costs(weight: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """What each weight (out, columns) costs that goes first, or with its run of a block: summed over the run, that.

    `factor` (columns, columns) is that part of the upper Cholesky factor of the inverse Gram matrix.
    """
    size = 1 if pattern.of else pattern.block
    runs = weight.unflatten(1, (-1, size)).transpose(0, 1)  # (runs, out, size)
    places = torch.arange(len(factor)).view(-1, size)
    corners = factor[places[:, :, None], places[:, None, :]]  # (runs, size, size), upper triangular
    whitened = torch.linalg.solve_triangular(corners, runs, upper=True, left=False)
    return whitened.square().transpose(0, 1).flatten(1)


def _without(scores: Tensor, held: Tensor | None) -> Tensor:
    """The scores, 0 where a weight is gone already."""
    return scores if held is None else scores * held


def _masked(weight: Tensor, kept: Tensor, held: Tensor | None) -> Sparse:
    """The weight with zeros, and what is held of it."""
    kept = kept if held is None else kept & held
    return weight.detach() * kept, kept
