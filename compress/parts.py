"""Parts of a model on their own: a block as the model calls it, cut to any sizes, ready to be timed.

A decoder that generates calls a block in two ways: once with the whole prompt and an empty cache, then with one token
and the cache of all before it. The cache of a cut block is not that of the whole one, so the cut block makes its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from compress.layout import Layout
from compress.runtimes.torch import cache_argument, uncached


@dataclass(frozen=True)
class Call:
    """How a block was called: its arguments' leaves, tensors among them, and the tree they hang on."""

    leaves: tuple[Any, ...]
    tree: Any

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves that are tensors."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    @property
    def cached(self) -> bool:
        """Whether the block was handed a cache."""
        return any(isinstance(leaf, Cache) for leaf in self.leaves)


Kept = list[tuple[int, Tensor, Tensor]]  # what a cache holds: layer, keys and values (batch, heads, past, head)


class Part(nn.Module):
    """A module that takes the tensors of a call by position, then those of its cache, and gives what it returns."""

    def __init__(self, module: nn.Module, call: Call, past: Kept) -> None:
        super().__init__()
        self.module = module
        self.call = call
        self.layers = [layer for layer, _, _ in past]
        self.inputs = [*call.tensors, *(tensor for _, *pair in past for tensor in pair)]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Put the tensors in their places and call the module; the cache comes back, longer, after the outputs."""
        outputs, kept = self.run(tensors)
        return [*outputs, *(tensor for _, *pair in kept for tensor in pair)]

    def run(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Kept]:
        """Call the module; what it returns and what its cache then holds."""
        given, cache = iter(tensors), DynamicCache()
        leaves = [
            next(given) if isinstance(leaf, Tensor) else cache if isinstance(leaf, Cache) else leaf
            for leaf in self.call.leaves
        ]
        for index in self.layers:
            cache.layers += [DynamicLayer() for _ in range(index + 1 - len(cache.layers))]
            layer: Any = cache.layers[index]
            keys, values = next(given), next(given)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        args, kwargs = pytree.tree_unflatten(leaves, self.call.tree)
        outputs = pytree.tree_leaves(self.module(*args, **kwargs), is_leaf=_is_cache)
        layers: Any = list(enumerate(cache.layers))
        kept = [(index, layer.keys, layer.values) for index, layer in layers if layer.is_initialized]
        return [leaf for leaf in outputs if isinstance(leaf, Tensor)], kept


def part(module: nn.Module, call: Call, before: Call | None = None) -> Part:
    """A module to be called as `call` tells, with the cache that the call `before` leaves; else with an empty one.

    An empty cache has tensors of length 0, as in a deployed decoder.
    """
    if not call.cached:
        return Part(module, call, [])
    first = Part(module, before or call, [])
    with torch.no_grad():
        _, kept = first.run(first.inputs)
    return Part(module, call, kept if before else [(at, keys[:, :, :0], values[:, :, :0]) for at, keys, values in kept])


def captured(
    model: PreTrainedModel, blocks: set[str], inputs: Mapping[str, Tensor], cache: Cache | None = None
) -> dict[str, Call]:
    """How each block is called in one call of the model; under "" the call itself. A cache given is filled."""
    given = {name: value.clone().to(model.device) for name, value in inputs.items()}
    if "attention_mask" in given:
        given["attention_mask"][:, -1:] = 0  # with nothing masked the blocks would be called without a mask
    calls: dict[str, Call] = {}

    def remember(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=_is_cache)
            calls[block] = Call(tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in leaves), tree)

        return hook

    hooks = [model.get_submodule(b).register_forward_pre_hook(remember(b), with_kwargs=True) for b in sorted(blocks)]
    was_training = model.training
    kept = uncached(model) if cache is None else {cache_argument(model): cache, "use_cache": True}
    try:
        with torch.no_grad():
            model.eval()(**given, **kept)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return calls


def cut(model: PreTrainedModel, layout: Layout, block: str, sizes: Mapping[str, int]) -> nn.Module:
    """A copy of a block, or of the model, cut to the given sizes; other blocks are not copied."""
    if block:
        shell: Any = nn.Module()
        shell.config, shell.base_model_prefix = copy.deepcopy(model.config), model.base_model_prefix
        *parents, leaf = block.split(".")
        inner = shell
        for name in parents:
            inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        inner.add_module(leaf, copy.deepcopy(model.get_submodule(block)))
    else:
        shell = copy.deepcopy(model)
    for name, size in sizes.items():
        layout = layout.cut(shell, name, range(size))
    return shell.get_submodule(block).eval()


def _is_cache(value: Any) -> bool:
    """A cache is one leaf, though exporting makes transformers register it as a tree."""
    return isinstance(value, Cache)
