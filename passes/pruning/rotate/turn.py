"""Writes a model anew in other axes of its residual stream: the weights, and a config that tells their shapes.

With the bases B (hidden, width) of `basis.py`, whatever adds a row x to the stream adds x B. A weight W (out, hidden)
that reads it through a norm of gain g and bias b becomes ``W diag(g) B``, and the norm is left without a say of its
own: its gain is ``sqrt(hidden / width)``, as its mean square is now over `width` places. Norms with a bias take off
the mean, so coordinates sum to zero and tell a reader nothing in the direction of ones. That is where the bias goes: it
becomes ones, and what b did to the reader, ``W b 1^T / width``, is added to the reader's weight. So a head that has no
bias of its own still hears that of the last norm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import LayoutError
from compress.layout import RECORD, VERSION, Layout, prefix_of, record_of, stored_dim
from compress.stream import stream_entries
from compress.uniform import HIDDEN, filled, resized
from passes.pruning.rotate.basis import basis, even
from passes.pruning.rotate.stream import Stream
from passes.pruning.uniform.candidates import above_weight


@dataclass(frozen=True)
class Axes:
    """The bases (hidden, width) of a model's blocks in order, or one for all.

    What lies before the first block is in the first one's axes, what lies behind the last in the last one's.
    """

    bases: tuple[Tensor, ...]
    blocks: tuple[str, ...]

    @property
    def width(self) -> int:
        """Places along the stream."""
        return self.bases[0].shape[1]

    def of(self, name: str, writes: bool = False) -> Tensor:
        """The basis of a module or parameter."""
        inside = [place for place, block in enumerate(self.blocks) if name.startswith(f"{block}.")]
        place = inside[0] if inside else 0 if writes else -1
        return self.bases[place if len(self.bases) > 1 else 0]

    def shortcuts(self) -> dict[str, Tensor]:
        """The weights (width, width) between blocks of unlike axes, by the name of the block they follow."""
        pairs = zip(self.blocks, self.bases, self.bases[1:], strict=False)
        return {block: after.T @ before for block, before, after in pairs}


def axes_of(layout: Layout, stream: Stream, covariances: Mapping[str, Tensor], width: int, each: bool) -> Axes:
    """The axes that keep most of the covariances (hidden, hidden) before all norms, for the model or for each block.

    What a block writes leaves it in its own axes, so those also serve the norm that comes next, in whatever block.
    """
    blocks = tuple(f"{name}.{index}" for name, stack in layout.stacks.items() for index in range(stack.length))
    places = [range(len(stream.norms))]
    if each:
        inside = [[i for i, norm in enumerate(stream.norms) if norm.startswith(f"{block}.")] for block in blocks]
        places = [range(run[0], run[-1] + 2) for run in inside]
    sums = (even([covariances[stream.norms[place]] for place in run]) for run in places)
    return Axes(tuple(basis(one, width, stream.centred) for one in sums), blocks)


def turned(model: PreTrainedModel, layout: Layout, stream: Stream, axes: Axes) -> PreTrainedModel:
    """A new model in the axes, on the device and in the mode of the one given, which stays as it was.

    It is a stock model where a stock config can tell its width; else its config has a record. An embedding that also
    was the head, whose norm's gain it doesn't share, is that no longer.
    """
    weights = _weights(model, stream, axes)
    shortcuts = axes.shortcuts()
    for block, weight in shortcuts.items():
        weights[f"{block}.shortcut.weight"] = weight.to(model.dtype)
    config = _config(model, layout, axes.width, [block.removeprefix(prefix_of(model)) for block in shortcuts])
    config.tie_word_embeddings = False
    return filled(model, config, weights)


def _config(model: PreTrainedModel, layout: Layout, width: int, shortcuts: list[str]) -> Any:
    """The config of a model with another width of its stream: a stock one where that can tell it."""
    if not shortcuts:
        try:
            return resized(model, layout, {HIDDEN: width})
        except LayoutError:  # no entry for the size of a head, or a width that transformers refuses with these heads
            pass
    config = copy.deepcopy(model.config)
    record = {**record_of(config), **stream_entries(width, shortcuts)}
    config.quantization_config = {"quant_method": RECORD, "version": VERSION, **record}
    return config


def _weights(model: PreTrainedModel, stream: Stream, axes: Axes) -> dict[str, Tensor]:
    """The weights of a model in other axes, by name; computed in float64."""
    weights = dict(model.state_dict())
    for name, norm in stream.readers.items():
        weights[name] = _read(model, name, model.get_submodule(norm), axes.of(norm))
    for name, dim in stream.writers.items():
        held = weights[name].double().movedim(dim, -1) @ axes.of(name, writes=True)
        weights[name] = held.movedim(-1, dim).to(weights[name].dtype).contiguous()
    for norm in stream.norms:
        module: Any = model.get_submodule(norm)
        gain = (module.weight.numel() / axes.width) ** 0.5
        weights[f"{norm}.weight"] = torch.full_like(module.weight[: axes.width], gain - above_weight(module))
        if getattr(module, "bias", None) is not None:
            weights[f"{norm}.bias"] = torch.ones_like(module.bias[: axes.width])
    return weights


def _read(model: PreTrainedModel, name: str, norm: Any, basis: Tensor) -> Tensor:
    """The weight `name` of a layer that reads a norm, in the axes of a basis (hidden, width)."""
    module: Any = model.get_submodule(name.rpartition(".")[0])
    turn = stored_dim(module, 1) == 0
    weight = module.weight.detach().double()
    weight = weight.T if turn else weight
    new = (weight * (norm.weight.detach().double() + above_weight(norm))) @ basis
    if getattr(norm, "bias", None) is not None:
        new += (weight @ norm.bias.detach().double())[:, None] / basis.shape[1]
    return (new.T if turn else new).to(module.weight.dtype).contiguous()
