"""Watch a model's blocks at work: the states before and after each, and what it would give if called again.

Blocks are hooked, as the hidden states that models return are not all raw: the last of them stand after a norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.layout import Layout
from compress.runtimes.torch import uncached
from compress.statistics import frozen, real_rows

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a block: the states `before` and `after` it (batch, tokens, hidden); `again` repeats it."""

    block: str
    before: Tensor
    after: Tensor
    again: Callable[[], Tensor]


def blocks_of(layout: Layout) -> list[str]:
    """Names of all blocks in the order in which they run."""
    return [f"{stack.module}.{index}" for stack in layout.stacks.values() for index in range(stack.length)]


@contextmanager
def watched(model: PreTrainedModel, blocks: Sequence[str], see: Callable[[Call], None]) -> Iterator[None]:
    """Let `see` see every call of the named blocks."""

    def watch(block: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # `forward` itself calls no hook, so that what is seen again is not seen twice.
            see(Call(block, entering(args, kwargs), states(output), lambda: states(module.forward(*args, **kwargs))))

        return hook

    with ExitStack() as hooks:
        for block in blocks:
            handle = model.get_submodule(block).register_forward_hook(watch(block), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


@contextmanager
def stepped_over(model: PreTrainedModel, blocks: Sequence[str]) -> Iterator[None]:
    """Let states leave the named blocks as they came, which is what dropping these does."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = entering(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(model.get_submodule(block).register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def remembered(model: PreTrainedModel, blocks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Give what each of the named blocks returns inside, by its name."""
    outputs: dict[str, Any] = {}

    def keep(block: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs[block] = output

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(model.get_submodule(block).register_forward_hook(partial(keep, block)).remove)
        yield outputs


@contextmanager
def recalled(model: PreTrainedModel, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Let the named blocks return what is given, without being run."""
    with ExitStack() as undone:
        for block, output in outputs.items():
            module: Any = model.get_submodule(block)
            module.forward = lambda *args, output=output, **kwargs: output
            undone.callback(delattr, module, "forward")
        yield


def entering(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def states(output: Any) -> Tensor:
    """The states that a block gives; some give more beside them."""
    return output[0] if isinstance(output, tuple) else output


def answer(model: PreTrainedModel, batch: Batch) -> Any:
    """The outputs of a model on a batch, labels left out and without a cache, which a second call would lengthen."""
    known = inspect.signature(model.forward).parameters
    inputs = {name: value.to(model.device) for name, value in batch.items() if name in known and name != "labels"}
    return model(**inputs, **uncached(model))


def read_rows(
    model: PreTrainedModel, layers: Iterable[str], batches: Iterable[Batch], see: Callable[[str, Tensor], None]
) -> None:
    """Let `see` see, by name, what each named layer reads of batches: rows (tokens, in) in float32, without padding."""
    mask: Tensor | None = None

    def seeing(name: str) -> Any:
        return lambda module, inputs: see(name, real_rows(inputs[0].detach(), mask))

    with ExitStack() as hooks, frozen(model):
        for name in layers:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(seeing(name)).remove)
        for batch in batches:
            mask = batch.get("attention_mask")
            answer(model, batch)


def real_tokens(layout: Layout, block: str, batch: Batch, hidden: Tensor) -> Tensor:
    """Which tokens (batch, tokens) of the states of a block are no padding; all where the batch has no mask of theirs.

    The last of several stacks is a decoder, which reads a text of its own.
    """
    *others, last = layout.stacks
    decoding = others and block.startswith(f"{last}.")
    mask = batch.get("decoder_attention_mask" if decoding else "attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return mask.to(hidden.device).bool()


def first_of(mask: Tensor) -> Tensor:
    """The first true place of each row, as a mask of the same shape (batch, tokens)."""
    return mask & (mask.cumsum(1) == 1)


def last_of(mask: Tensor) -> Tensor:
    """The index of the last true place of each row, (batch,)."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
