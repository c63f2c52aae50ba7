"""Bases of the residual stream: where its energy lies on calibration text, as numbers (SliceGPT, arXiv:2401.15024).

States are rows, so a stream X (tokens, hidden) becomes X B with a basis B (hidden, width) of orthonormal columns, the
leading eigenvectors of its covariance ``C = X^T X``: none of that width keeps more of the energy ``trace C``, and what
is lost is the sum of the eigenvalues left out.

Norms that take off the mean (LayerNorm) are commonly replaced by RMS norms first. There is no need to: such a norm sees
of X only ``X M``, with ``M = I - 1 1^T / hidden``, so the axes are those of ``M C M``; and if the new coordinates have
a mean of zero by themselves, a stock LayerNorm of the new width takes off nothing and is the RMS norm that is wanted.
They have it once one of the new places is spent on that: ``B = V R^T``, where V (hidden, width - 1) are the leading
eigenvectors, and R (width, width - 1) is an orthonormal basis of all coordinates that sum to zero. With width = hidden
nothing is lost, since M had already taken one direction away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def basis(covariance: Tensor, width: int, centred: bool) -> Tensor:
    """The basis (hidden, width) that keeps most of a covariance (hidden, hidden), in float64.

    `centred` bases give coordinates that sum to zero, and are blind to the mean of what they read, also where fewer
    directions than `width` have any energy.
    """
    if not centred:
        return leading(covariance, width)
    plane = summing_to_zero(len(covariance)).to(covariance.device)
    directions = plane @ leading(plane.T @ covariance.double() @ plane, width - 1)
    return directions @ summing_to_zero(width).T.to(covariance.device)


def leading(covariance: Tensor, count: int) -> Tensor:
    """The eigenvectors (size, count) of the largest eigenvalues of a covariance (size, size)."""
    return torch.linalg.eigh(covariance.double()).eigenvectors.flip(1)[:, :count]  # eigh sorts from the least


def kept_energy(covariance: Tensor, basis: Tensor) -> float:
    """The share of the energy of a covariance (hidden, hidden) that a basis (hidden, width) keeps."""
    seen = covariance.double()
    return float(torch.trace(basis.T @ seen @ basis) / torch.trace(seen))


def even(covariances: Sequence[Tensor]) -> Tensor:
    """The sum of covariances (hidden, hidden), each given the same energy, so that no place drowns another."""
    return torch.stack([one.double() / torch.trace(one.double()) for one in covariances]).sum(0)


def of_length_one(centred: bool) -> Callable[[Tensor], Tensor]:
    """The view of states (tokens, hidden) that norms take, but for a factor: each of length one."""
    return lambda rows: functional.normalize(rows - rows.mean(1, keepdim=True) if centred else rows)


def centre(covariance: Tensor) -> Tensor:
    """``M C M``: the covariance of states whose mean over the channels was taken off."""
    rows = covariance.double()
    rows = rows - rows.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def summing_to_zero(width: int) -> Tensor:
    """An orthonormal basis (width, width - 1) of the vectors that sum to zero: cosines, those of the DCT-II."""
    places = (torch.arange(width, dtype=torch.float64) + 0.5) * math.pi / width
    return (2 / width) ** 0.5 * torch.cos(places[:, None] * torch.arange(1, width, dtype=torch.float64))
