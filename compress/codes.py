"""Codes of few bits that training can pass through: signs, and whole numbers of a learned step.

The value is that of the codes, bit for bit; the gradient is as if a value within the range of its codes had been left
as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

SMALLEST = 1e-6  # step


def through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, bit for bit, with the gradient of `soft`."""
    return hard + (soft - soft.detach()) if soft.requires_grad else hard


def signs(values: Tensor) -> Tensor:
    """1 where a value isn't negative, else -1; the gradient passes where its magnitude is 1 at most."""
    return through(torch.where(values >= 0, 1.0, -1.0).to(values.dtype), values.clamp(-1, 1))


def binary(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Signs (..., in) and scales (...) of rows (..., in), each taken about its mean."""
    centred = rows - rows.mean(-1, keepdim=True)
    return signs(centred), centred.detach().abs().mean(-1)


class Signs(nn.Module):
    """Codes that are signs."""

    bits, range = 1, (-1, 1)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | float]:
        """The codes, and what one of them is worth."""
        return signs(values), 1.0


class Elastic(nn.Module):
    """Codes of `bits` bits with a learned step, and a learned shift that has the shape given.

    In one bit they are 1 and -1, or 1 and 0 if `unsigned`.
    """

    def __init__(self, shape: tuple[int, ...], unsigned: bool) -> None:
        super().__init__()
        self.bits, self.unsigned = 1, unsigned
        self.step = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(shape))

    @property
    def range(self) -> tuple[int, int]:
        """The least code and the greatest."""
        if self.unsigned:
            return 0, 2**self.bits - 1
        return (-1, 1) if self.bits == 1 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | float]:
        """The codes, and the step.

        The gradient of the step is a sum over all values; without its scale it would drown all others in their norm.
        """
        low, high = self.range
        held = self.step.detach().clamp(min=SMALLEST)
        step = through(held, self.step * (values.numel() * high) ** -0.5)
        steps = (values - self.shift) / step
        if low == -high:
            return signs(steps), step
        return through(steps.detach().round().clamp(low, high), steps.clamp(low, high)), step

    @torch.no_grad()
    def fit_(self, values: Tensor) -> None:
        """Choose the step from values met, as LSQ does.

        Signs would be nearer with half of it, but then the gradient would reach too few of the values.
        """
        self.step.copy_((4 if self.unsigned else 2) * values.abs().mean() / self.range[1] ** 0.5)


@contextmanager
def fitting(model: nn.Module) -> Iterator[None]:
    """Inside, every step is chosen from the values that it meets."""
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Elastic):
                hooks.callback(module.register_forward_pre_hook(lambda one, given: one.fit_(given[0])).remove)
        yield
