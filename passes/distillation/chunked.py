"""Losses of a language model's predictions without its logits: the head and the loss, some rows at a time.

Of a large vocabulary the logits are most of what training holds: 2048 tokens by 150,000 classes are 1.2 GB, and a loss
makes several copies. But a loss that is a sum over rows needs few of them at a time, and all that must outlive a row is
its loss and the gradient of what the head read, which has the width of the model. So `summed` multiplies a block of
rows by the head, takes the loss and at once its gradient, which takes the place of the logits, and goes on with the
next. Nothing is computed twice: the backward pass only scales what is there.

A block has as many rows as the device needs to multiply matrices well. The loss inside, and its gradient, make copies
too, and are taken of fewer rows yet: on a processor of so few that the copies stay in its cache, for which they are
quicker than those of all rows.

The idea is Cut Cross-Entropy's (Wijmans et al., arXiv:2411.09009), whose kernel goes further and cuts the vocabulary
as well; blocks of rows are enough for matrices that any device multiplies well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compress.data.batches import IGNORED
from passes.distillation.losses.predictions import Projected

PROBE = (0, 1, 0)
RowLoss = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Held:
    """How many logits exist at a time: those of a block, and those that the loss looks at."""

    block: int
    part: int


HELD = {"cpu": Held(2**25, 2**18), "cuda": Held(2**26, 2**26)}


def held_on(device: torch.device) -> Held:
    """How many logits exist at a time on a device."""
    return HELD.get(device.type, HELD["cuda"])


def summed(loss: RowLoss, predictions: Projected, target: Any) -> Tensor:
    """The sum of ``loss(logits, target)`` over parts of the rows, with logits (rows of the part, classes).

    `loss` is a sum over the rows that it is given; `target` is what it compares them with, row by row: a tensor (rows,
    ...), `Projected` or `Draws`. The logits are float32 at least, whatever the states and the weight are. Gradients go
    to the states, and to weight and bias where those want any.
    """
    states, weight, bias = predictions.states, predictions.weight, predictions.bias
    return _Summed.apply(states, weight, bias, loss, target, torch.is_grad_enabled())


def cross_entropy(predictions: Projected, labels: Tensor) -> Tensor:
    """The cross-entropy of predictions (rows) and labels (rows,), averaged over the rows; 0 where there are none."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="sum")

    return summed(loss, predictions, labels) / max(1, len(predictions))


def next_token(predictions: Projected, labels: Tensor) -> Tensor:
    """A causal language model's loss: the cross-entropy of each token by the states (batch, sequence) before it."""
    goals = labels[:, 1:]
    rows = replace(predictions, states=predictions.states[:, :-1]).counted(goals != IGNORED)
    return cross_entropy(rows, goals[goals != IGNORED])


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head of a causal language model, where it is a Linear and nothing comes after it but the usual loss.

    None where logits are capped or scaled, or where the model's own loss is another than the cross-entropy of the next
    token: told by running it on three tokens, as models say it nowhere.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    ids = torch.tensor([PROBE], device=head.weight.device)
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    try:
        with torch.no_grad(), torch.random.fork_rng():
            outputs = model(input_ids=ids, labels=ids, use_cache=False)
            logits = head(read[0])
            usual = functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    finally:
        hook.remove()
    plain = torch.equal(outputs.logits, logits) and torch.allclose(outputs.loss.float(), usual)
    return head if plain else None


@contextmanager
def headless(head: nn.Linear) -> Iterator[None]:
    """Inside, a model's logits are what its head would have read."""
    vars(head)["forward"] = lambda states: states
    try:
        yield
    finally:
        del vars(head)["forward"]


def projected(states: Tensor, head: nn.Linear) -> Projected:
    """Predictions by a head that has not run, in the precision in which it would have."""
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    return Projected(states.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))


class _Summed(torch.autograd.Function):
    """A sum over blocks of rows whose gradients are taken on the way."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, loss: RowLoss, target: Any, graded: bool
    ) -> Tensor:
        inputs = (states, weight, bias)
        wanted = [graded and need for need in ctx.needs_input_grad[:3]]
        wide = torch.promote_types(states.dtype, torch.float32)
        # A sum over many blocks loses digits in bfloat16.
        slopes = [
            torch.zeros_like(one, dtype=wide) if want and one is not None else None
            for one, want in zip(inputs, wanted, strict=True)
        ]
        total = states.new_zeros((), dtype=wide)
        for block in slices(len(states), held_on(states.device).block // len(weight)):
            logits, against = functional.linear(states[block], weight, bias), target[block]
            for part in slices(len(logits), held_on(states.device).part // len(weight)):
                leaf = logits[part].to(wide).detach().requires_grad_(any(wanted))
                with torch.set_grad_enabled(any(wanted)):
                    value = loss(leaf, against[part])
                total += value.detach()
                if any(wanted):
                    logits[part] = torch.autograd.grad(value, leaf)[0]
            if slopes[0] is not None:
                slopes[0][block] = logits @ weight
            if slopes[1] is not None and weight.dtype == wide:
                slopes[1].addmm_(logits.T, states[block])
            elif slopes[1] is not None:
                slopes[1] += logits.T @ states[block]
            if slopes[2] is not None:
                slopes[2] += logits.sum(0)
            del logits, leaf, value, against  # any of them would hold this block while the next is made
        ctx.save_for_backward(*slopes)
        ctx.kinds = [None if one is None else one.dtype for one in inputs]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        slopes = zip(ctx.saved_tensors, ctx.kinds, strict=True)
        return *(None if one is None else (one * given).to(kind) for one, kind in slopes), None, None, None


def slices(count: int, most: int) -> Iterator[slice]:
    """Slices of so many rows at most, one after another."""
    for start in range(0, count, max(1, most)):
        yield slice(start, start + max(1, most))
