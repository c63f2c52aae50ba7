"""ALPS on tensors: the sparse matrix whose outputs are nearest, by ADMM with a penalty that rises as the zeros settle.

Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", 2024
(arXiv:2406.07831). The problem is ``min tr((B - W) G (B - W)^T)`` over ``B = D`` with ``D`` in the pattern, ``G`` the
damped Gram matrix scaled to a unit diagonal and ``W`` scaled against it. One eigendecomposition of ``G`` makes every
step cheap: ``B = (W G - V + r D) inv(G + r)``, ``D`` the pattern's best of ``B + V / r``, ``V <- V + r (B - D)``
(equation 5). The penalty ``r`` follows how many zeros have moved (section 3.2). Then the weights that stay are fitted
by conjugate gradients, each row by itself (section 3.3). All is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.gram import damped
from passes.pruning.sparse.oneshot import Sparse
from passes.pruning.sparse.pattern import Pattern

START, HIGHEST = 0.1, 1e6  # the penalty
STEPS, LEAST, EVERY = 300, 30, 3  # of ADMM: at most, at least, and from one look at the zeros to the next
SETTLED = 3e-4  # share of kept weights that move when there is nothing left to gain
REFITS = 10


def alps(
    weight: Tensor, gram: Tensor, pattern: Pattern, held: Tensor | None = None, *, damping: float = 0.01
) -> Sparse:
    """Make a matrix (out, in) sparse so that its outputs stay near; entries that aren't `held` are gone and stay so.

    The diagonal of `gram` (in, in) is raised by `damping` of its mean. Weights compete over the whole matrix, or
    within their run for N:M. Returns the weight in its dtype, and which of its entries are held.
    """
    raised = damped(gram, damping)
    scale = raised.diagonal().sqrt()
    unit = raised / scale / scale[:, None]
    target = torch.where(gram.diagonal() == 0, 0.0, weight.detach().double()) * scale
    found, kept = admm(target, unit, pattern, held)
    fitted = refit(target, unit, kept, found)
    return (fitted / scale).to(weight.dtype), kept


def admm(weight: Tensor, gram: Tensor, pattern: Pattern, held: Tensor | None = None) -> Sparse:
    """Zeros that cost little, and weights between them that are not fitted yet; `gram` has a unit diagonal."""
    values, turn = torch.linalg.eigh(gram)
    pulled = weight @ gram

    def nearest(point: Tensor) -> tuple[Tensor, Tensor]:
        kept = pattern.kept(point.square()) if held is None else pattern.kept(point.square() * held) & held
        return point * kept, kept

    def fresh() -> tuple[Tensor, Tensor, Tensor]:
        return (*nearest(weight), torch.zeros_like(weight))

    penalty, moved_once = START, False
    sparse, kept, dual = fresh()
    before = kept
    for step in range(1, STEPS + 1):
        free = (pulled - dual + penalty * sparse) @ turn / (values + penalty) @ turn.T
        sparse, kept = nearest(free + dual / penalty)
        dual = dual + penalty * (free - sparse)
        if step % EVERY:
            continue
        moved = int((kept ^ before).sum())
        share, before = moved / max(1, int(kept.sum())), kept
        if moved_once and (not moved or (step >= LEAST and share < SETTLED)):
            break
        if share > 0.005:
            moved_once = True
            penalty *= 1.3 if share > 0.1 else 1.2
        elif moved_once:
            penalty *= 1.1
        else:  # so strong a penalty that the zeros stay where magnitude put them
            penalty /= 5
            sparse, kept, dual = fresh()
            before = kept
        penalty = min(penalty, HIGHEST)
    return sparse, kept


def refit(weight: Tensor, gram: Tensor, kept: Tensor, start: Tensor, steps: int = REFITS) -> Tensor:
    """Fit the kept entries of each row to ``min (b - w) G (b - w)^T`` by conjugate gradients from `start`.

    With as many `steps` as a row has kept entries the gradient ``(b - w) G`` vanishes there, up to rounding. `gram`
    has a unit diagonal, which is all that preconditioning by the diagonal would do.
    """
    point = start * kept
    residual = ((weight - point) @ gram) * kept
    direction, norm = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ gram) * kept
        length = _ratio(norm, (direction * curved).sum(1, keepdim=True))
        point, residual = point + length * direction, residual - length * curved
        before, norm = norm, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(norm, before) * direction
    return point


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """A quotient, 0 where a row has converged."""
    return torch.where(other > 0, one / other.clamp(min=1e-300), 0.0)
