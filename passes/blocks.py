"""Walks a model block by block: each sees its inputs as the blocks before it, already changed, leave them.

The model runs once as it is and every block keeps how it was called, but for the states that pass through; of those,
only what enters the block at hand is held. So a block is called twice, once to be looked at and once when it has
changed, and the rest of the model not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.errors import LayoutError
from compress.layout import Layout
from compress.statistics import frozen
from passes.watch import answer, entering, states

NAME = "hidden_states"


@dataclass
class Entered:
    """A block, and for each calibration batch its mask, the states that enter, and what else it is called with."""

    name: str
    module: nn.Module
    calls: list[dict[str, Any]]

    def run(self, call: Mapping[str, Any]) -> Tensor:
        """The states (batch, tokens, hidden) that the block gives for one batch."""
        with frozen(self.module):
            return states(self.module(call[NAME], *call["args"], **call["kwargs"]))


def entered(model: PreTrainedModel, layout: Layout, batches: Sequence[Mapping[str, Tensor]]) -> Iterator[Entered]:
    """Yield every block in the order they run; what is done to one before the next is taken is seen by those after it.

    A stack is called anew when the one before it is done: decoders read what encoders give.
    """
    if not layout.stacks:
        raise LayoutError(f"{type(model).__name__} has no blocks that run one after another")
    for stack in layout.stacks.values():
        names = [f"{stack.module}.{index}" for index in range(stack.length)]
        calls = _calls(model, names, batches)
        held = [call[NAME] for call in calls[names[0]]] if names else []
        for name in names:
            block = Entered(name, model.get_submodule(name), calls.pop(name))
            for call, before in zip(block.calls, held, strict=True):
                call[NAME] = before
            yield block
            held = [block.run(call) for call in block.calls]


def _calls(
    model: PreTrainedModel, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, list[dict[str, Any]]]:
    """How each block is called for each batch; only the first one's states are kept."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    mask: Tensor | None = None

    def noting(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before = entering(args, kwargs)
            rest = {key: value for key, value in kwargs.items() if key != NAME}
            states_kept = before if name == names[0] else torch.empty(0)
            call = {"attention_mask": mask, NAME: states_kept, "args": args[1:], "kwargs": rest}
            found[name].append(call)

        return hook

    with ExitStack() as hooks, frozen(model):
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(noting(name), with_kwargs=True).remove)
        for batch in batches:
            mask = batch.get("attention_mask")
            answer(model, batch)
    return found


def matrices_of(model: PreTrainedModel, block: str, seen: Mapping[int, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The linear layers of a block by name, and why others are none: their matrix was `seen`, by id, in that layer."""
    found: dict[str, Any] = {}
    skipped = {}
    for name, module in model.get_submodule(block).named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if id(module.weight) in seen:
            skipped[f"{block}.{name}"] = f"its matrix is that of {seen[id(module.weight)]}"
        else:
            found[f"{block}.{name}"] = module
    return found, skipped


def put_everywhere(model: PreTrainedModel, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another in every module that has it: folded blocks share theirs."""
    for module in model.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            if held is old:
                setattr(module, name, new)
