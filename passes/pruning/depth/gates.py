"""Gates that rank blocks together, and how alike neighbouring blocks are.

A gate g weighs what a block adds, ``x + g (F(x) - x)`` with x going in and F(x) coming out: at 1 the block is as it
was, at 0 the model is that without it. It is ``g = m^2 / (m^2 + epsilon)``, flat at 0 and near 1, and epsilon falls
while the scalars m are trained, so that every gate ends open or shut. All of them are trained at once and the weights
stay, so the ranking knows what one block makes up for another. FoldGPT, arXiv:2407.00928, which does not print the
form of its gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.progress import track
from compress.statistics import frozen, run_body
from passes.distillation.losses import square_head

EPSILONS = (1e-1, 1e-4)  # at the first step, where a scalar of 1 is a gate of 0.91, and at the last
Batches = Sequence[Mapping[str, Tensor]]


def gate(scalars: Tensor, epsilon: float) -> Tensor:
    """Gates in [0, 1] of scalars of any shape."""
    return scalars.square() / (scalars.square() + epsilon)


@contextmanager
def gated(blocks: Sequence[nn.Module], gates: Tensor) -> Iterator[None]:
    """Let each block weigh what it adds by its entry of `gates` (blocks,) inside."""

    def weigh(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            before, after = _states(args, kwargs, output)
            mixed = before + gates[index] * (after - before)
            return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

        return hook

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.callback(block.register_forward_hook(weigh(index), with_kwargs=True).remove)
        yield


def train_gates(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    penalty: float,
) -> Tensor:
    """How open each gate (blocks,) stood on the average of all steps, trained to shut while the last states stay.

    The loss is the squared error of the model's last states over their mean square, plus `penalty` times the mean
    gate. At the end many gates are equally shut, so what ranks them is how soon they went and how long they stayed.
    """
    scalars = torch.ones(len(blocks), device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([scalars], lr=learning_rate)
    first, last = EPSILONS
    total = torch.zeros(len(blocks), device=model.device)
    with frozen(model):
        for step, batch in track(zip(range(steps), cycle(batches), strict=False), "gates", steps):
            goal = run_body(model, batch)
            with torch.enable_grad():
                gates = gate(scalars, first * (last / first) ** (step / max(1, steps - 1)))
                with gated(blocks, gates):
                    states = run_body(model, batch)
                loss = square_head([states], [goal], _real(goal, batch)) + penalty * gates.mean()
                (scalars.grad,) = torch.autograd.grad(loss, [scalars])
            optimizer.step()
            total += gates.detach()
    return total / steps


def similarities(model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Batches) -> list[float]:
    """The cosine of each block's input and output, averaged over real tokens: one minus ShortGPT's block influence.

    The input of a block is the output of the one before, so it is also how alike the outputs of the two are.
    """
    sums, count = torch.zeros(len(blocks), dtype=torch.float64), [0] * len(blocks)
    batch: Mapping[str, Tensor] = {}

    def read(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _states(args, kwargs, output)
            cosines = F.cosine_similarity(before.float(), after.float(), dim=-1)[_real(after, batch)]
            sums[index] += float(cosines.double().sum())
            count[index] += len(cosines)

        return hook

    with ExitStack() as hooks, frozen(model):
        for index, block in enumerate(blocks):
            hooks.callback(block.register_forward_hook(read(index), with_kwargs=True).remove)
        for batch in track(batches, "similarities", len(batches)):
            run_body(model, batch)
    return (sums / torch.tensor(count)).tolist()


def _states(args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
    """The hidden states that went into a block and that came out of it."""
    before = args[0] if args else kwargs["hidden_states"]
    return before, output if isinstance(output, Tensor) else output[0]


def _real(states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Which of states (batch, tokens, hidden) are no padding; all of them where the batch's mask is another stack's."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != states.shape[:2]:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask.to(states.device).bool()
