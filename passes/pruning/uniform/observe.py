"""Reads a model's activations for the scores in importance.py: hooks, masks, and a block left out for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.layout import Axis
from compress.progress import track
from compress.statistics import frozen, run_body
from passes.pruning.uniform.importance import Score, Statistic, influence, per_row

Batches = Iterable[Mapping[str, Tensor]]


@dataclass
class Importance:
    """Scores by the name of an axis (units,), the ``stream`` (hidden,) and, per stack, of its `blocks` (length,).

    `squares` are, for each norm, the mean squares (hidden,) of what it reads.
    """

    axes: dict[str, Tensor] = field(default_factory=dict)
    stream: Tensor | None = None
    squares: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)


def measure_importance(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    norms: Sequence[str],
    stacks: Mapping[str, int],
    batches: Batches,
    batch: Statistic = "l2",
    sequence: Statistic = "mean",
) -> Importance:
    """Score, in one go over the batches, the units of `axes`, the channels of `norms` and the blocks of `stacks`.

    Norms that the model's body doesn't run, as those of a head, have no say. Raises DataError where nothing was read.
    """
    mask: Tensor | None = None
    rows = 0
    columns = {(axis.name, site.module): Score(batch) for axis in axes for site in axis.readers}
    channels, inputs = {name: Score(batch) for name in norms}, {name: Score("mean") for name in norms}
    turns = {(stack, index): Score("mean") for stack, length in stacks.items() for index in range(length)}

    def real(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tensor as (batch, tokens, units), and the mask where it is that of these tokens."""
        tensor = tensor.detach().reshape(rows, -1, tensor.shape[-1])
        return tensor, mask if mask is not None and mask.shape == tensor.shape[:2] else None

    def read(axis: Axis, width: int, score: Score) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            values, known = real(args[0])
            grouped = values.reshape(*values.shape[:2], axis.units, width)
            values = values if width == 1 else grouped.float().norm(dim=-1)
            score.add_(per_row(values, known, sequence))

        return hook

    def normed(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            channels[name].add_(per_row(*real(output), sequence))
            values, known = real(args[0])
            inputs[name].add_(per_row(values.float().square(), known, "mean"))

        return hook

    def turned(score: Score) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            (before, known), (after, _) = real(entering(args, kwargs)), real(leaving(output))
            score.add_(per_row(influence(before, after)[..., None], known, "mean"))

        return hook

    with ExitStack() as hooks, frozen(model):
        for axis in axes:
            for site in axis.readers:
                hook = read(axis, site.width, columns[axis.name, site.module])
                hooks.callback(model.get_submodule(site.module).register_forward_pre_hook(hook).remove)
        for name in norms:
            hooks.callback(model.get_submodule(name).register_forward_hook(normed(name)).remove)
        for (stack, index), score in turns.items():
            block = model.get_submodule(f"{stack}.{index}")
            hooks.callback(block.register_forward_hook(turned(score), with_kwargs=True).remove)
        for one in batches:
            mask, rows = one.get("attention_mask"), len(next(iter(one.values())))
            run_body(model, one)
    ran = [name for name, score in channels.items() if score.rows]
    found = Importance(squares={name: inputs[name].value() for name in ran})
    for (name, _), score in columns.items():
        found.axes[name] = score.value() + found.axes.get(name, 0)
    found.stream = torch.stack([channels[name].value() for name in ran]).sum(0) if ran else None
    for stack, length in stacks.items():
        found.blocks[stack] = torch.cat([turns[stack, index].value() for index in range(length)])
    return found


def removal_losses(model: PreTrainedModel, stack: str, length: int, loss: Callable[[], float]) -> Tensor:
    """How much the loss of the model rises without each block of a stack, the others staying; (length,)."""
    with frozen(model):
        whole, losses = loss(), []
        for index in track(range(length), "leave out blocks", length):
            with without(model, f"{stack}.{index}"):
                losses.append(loss() - whole)
    return torch.tensor(losses, dtype=torch.float64)


@contextmanager
def without(model: PreTrainedModel, block: str) -> Iterator[None]:
    """The model computes, inside, as if it had no such block."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = entering(args, kwargs)
        return (before, *output[1:]) if isinstance(output, tuple) else before

    handle = model.get_submodule(block).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def leaving(output: Any) -> Tensor:
    """The states that a block gives."""
    return output[0] if isinstance(output, tuple) else output
