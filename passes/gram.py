"""Gram matrices ``H = mean(x x^T)`` of what a layer reads: what pruning and quantization both do with them."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(gram: Tensor, damping: float) -> Tensor:
    """The Gram matrix in float64, its diagonal raised by `damping` of its mean; inputs never seen get a one."""
    raised = gram.to(torch.float64, copy=True)
    diagonal = raised.diagonal()
    dead = diagonal == 0
    diagonal += damping * diagonal.mean()
    diagonal[dead] = 1.0
    return raised


def inverse_factor(gram: Tensor) -> Tensor:
    """The upper triangular ``U`` with ``U^T U = inv(gram)``, (in, in)."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)


def output_error(change: Tensor, gram: Tensor) -> float:
    """Mean squared error of the outputs, summed over them, of a `change` (out, in) of the matrix: ``tr(D H D^T)``."""
    change = change.double()
    return float(((change @ gram.double()) * change).sum())
