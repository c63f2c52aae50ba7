"""What predictions may be besides logits: what a head reads and the head, or tokens drawn from a distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Projected:
    """Logits that are not multiplied out: states (..., width), and a head's weight (classes, width) and bias.

    A slice of its rows are logits (rows, classes).
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def counted(self, mask: Tensor) -> Projected:
        """The rows, one after another, where `mask` is true."""
        return Projected(picked(self.states, mask), self.weight, self.bias)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, part: slice) -> Tensor:
        logits = self.states[part] @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        return logits.float() if logits.element_size() < 4 else logits


@dataclass(frozen=True)
class Draws:
    """Tokens drawn from distributions p over a vocabulary, each tensor (..., most).

    ``sum_k weights_k f(ids_k)`` is on average over the draws ``sum_j p_j f(j)`` for any f: there is no bias, which the
    likeliest tokens alone have. `logs` are log p of the tokens, and places that are left over have weight 0.
    `temperature` is that of the softmax that made p of the logits.
    """

    ids: Tensor
    weights: Tensor
    logs: Tensor
    temperature: float = 1.0

    def counted(self, mask: Tensor) -> Draws:
        """The rows, one after another, where `mask` is true."""
        ids, weights, logs = (picked(one, mask) for one in (self.ids, self.weights, self.logs))
        return Draws(ids, weights, logs, self.temperature)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.ids[part], self.weights[part], self.logs[part], self.temperature)


def picked(values: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens: (batch, sequence, any) -> (tokens, any)."""
    return values.flatten(0, 1).index_select(0, mask.flatten().nonzero().flatten())
