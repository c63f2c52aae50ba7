"""Writes a model anew in other axes of its residual stream: the weights, and a config that tells their shapes.

With a basis B (hidden, width) of `basis.py`, whatever adds a row x to the stream adds x B. A weight W (out, hidden)
that reads it through a norm of gain g and bias b becomes ``W diag(g) B``, and the norm is left without a say of its
own: its gain is ``sqrt(hidden / width)``, as its mean square is now over `width` places. Norms with a bias take off
the mean, so coordinates sum to zero and tell a reader nothing in the direction of ones. That is where the bias goes: it
becomes ones, and what b did to the reader, ``W b 1^T / width``, is added to the reader's weight. So a head that has no
bias of its own still hears that of the last norm.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import LayoutError
from compress.layout import Layout, stored_dim
from compress.record import RECORD, VERSION, record_of
from compress.uniform import HIDDEN, filled, resized
from passes.pruning.rotate.stream import Stream
from passes.pruning.uniform.candidates import above_weight


def turned(model: PreTrainedModel, layout: Layout, stream: Stream, basis: Tensor) -> PreTrainedModel:
    """A new model in the axes of a basis (hidden, width), otherwise like the one given, which stays as it was.

    It is a stock model where a stock config can tell its width; else its config has a record. An embedding that also
    was the head, whose norm's gain it doesn't share, is that no longer.
    """
    config = _config(model, layout, basis.shape[1])
    config.tie_word_embeddings = False
    return filled(model, config, _weights(model, stream, basis))


def _config(model: PreTrainedModel, layout: Layout, width: int) -> Any:
    """The config of a model with another width of its stream: a stock one where that can tell it."""
    try:
        return resized(model, layout, {HIDDEN: width})
    except LayoutError:  # no entry for the size of a head, or a width that transformers refuses with these heads
        config = copy.deepcopy(model.config)
        record = {**record_of(config), "stream": width}
        config.quantization_config = {"quant_method": RECORD, "version": VERSION, **record}
        return config


def _weights(model: PreTrainedModel, stream: Stream, basis: Tensor) -> dict[str, Tensor]:
    """The weights of a model in the axes of a basis (hidden, width), by name; computed in float64."""
    weights, width = dict(model.state_dict()), basis.shape[1]
    gain = (len(basis) / width) ** 0.5
    for name, norm in stream.readers.items():
        weights[name] = _read(model, name, model.get_submodule(norm), basis)
    for name, dim in stream.writers.items():
        held = weights[name].double().movedim(dim, -1) @ basis
        weights[name] = held.movedim(-1, dim).to(weights[name].dtype).contiguous()
    for norm in stream.norms:
        module: Any = model.get_submodule(norm)
        weights[f"{norm}.weight"] = torch.full_like(module.weight[:width], gain - above_weight(module))
        if getattr(module, "bias", None) is not None:
            weights[f"{norm}.bias"] = torch.ones_like(module.bias[:width])
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
