"""The laws of narrowing, for every family: what comes out is the stock model of its config."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.errors import LayoutError
from compress.families import layout_of
from compress.record import record_of
from compress.uniform import HIDDEN, drop, narrow, places, spans, tied_to_heads
from tests.conftest import TINY, assert_one_model, precise

HEADS = ("num_attention_heads", "n_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads")
FOLLOWING = [("electra", {"embedding_size": 24}), *((name, {}) for name in TINY)]


def build(name, **entries):
    """A tiny model of a family, with two heads where its hidden width is that of its heads."""
    tiny = TINY[name]
    model = tiny.build(**entries)
    if tied_to_heads(model, layout_of(model)):
        model = tiny.build(**entries, **{entry: 2 for entry in HEADS if entry in tiny.entries})
    return model, layout_of(model)


def half(model, layout, channels):
    """What to keep so that the hidden width halves: the first head of two where the family ties it to them."""
    tied = tied_to_heads(model, layout)
    return {HIDDEN: channels, **{axis.name: [0] for axis in layout.axes.values() if tied and axis.kind == "heads"}}


def reads(module, dim):
    """Whether a stored dimension of a module's weight is that of its inputs."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return dim == 1
    return isinstance(module, Conv1D) and dim == 0


def twin_(model, layout):
    """Make each channel of the second half the twin of one in the first, which alone is read."""
    places_of, half = spans(model, layout), model.config.hidden_size // 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            for span in places_of[name]:
                if span.name == HIDDEN:
                    first, second = parameter.narrow(span.dim, 0, half), parameter.narrow(span.dim, half, half)
                    if name.endswith("weight") and reads(module, span.dim):
                        second.zero_()
                    else:
                        second.copy_(first)


@pytest.mark.parametrize(("name", "entries"), FOLLOWING)
def test_keeping_all_is_the_identity(name, entries):
    model, layout = build(name, **entries)
    inputs = TINY[name].example()
    same = narrow(model, layout, {})
    assert_one_model(same, model, inputs)
    assert layout_of(same) == layout


@pytest.mark.parametrize(("name", "entries"), FOLLOWING)
def test_what_is_narrowed_is_the_stock_model_of_its_config(name, entries):
    model, layout = build(name, **entries)
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    keep = range(1, model.config.hidden_size, 2)
    small = narrow(model, layout, half(model, layout, keep))
    assert small.config.hidden_size == len(keep)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    fresh = type(model)(type(small.config).from_dict(small.config.to_dict())).eval()
    assert not any(fresh.load_state_dict(small.state_dict()))
    inputs = TINY[name].example()
    assert_one_model(fresh, small, inputs)
    table = small.get_input_embeddings()
    if isinstance(table, nn.Embedding) and table.embedding_dim == len(keep):
        assert torch.equal(table.weight, model.get_input_embeddings().weight[:, list(keep)])
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in before.items())


@pytest.mark.parametrize("name", TINY)
def test_of_twin_channels_one_is_enough(name):
    """Means and mean squares over twins are those over one of each, so the norms see no difference."""
    tiny = replace(TINY[name], auto="AutoModel")
    entries = {entry: 2 for entry in HEADS if entry in tiny.entries}
    model = tiny.build()
    if tied_to_heads(model, layout_of(model)):
        model = tiny.build(**entries)
    layout = layout_of(model)
    keep = half(model, layout, range(model.config.hidden_size // 2))
    twin_(model, layout)
    for axis in keep.keys() - {HIDDEN}:
        layout.silence(model, axis, [1])
    small = narrow(model, layout, keep)
    if name == "gemma3":  # multiplies what it embeds by the root of the hidden width
        small.get_input_embeddings().weight.data *= 2**0.5
    wide = precise(model, tiny.example()).view(-1, model.config.hidden_size)
    narrowed = precise(small, tiny.example()).view(-1, small.config.hidden_size)
    torch.testing.assert_close(narrowed, wide[:, : small.config.hidden_size], rtol=1e-4, atol=1e-4)


def test_places_and_origins_outlive_narrowing_and_dropping():
    model, layout = build("bert")
    layout = drop(model, layout, "encoder.layer", [0, 2])
    small = narrow(model, layout, half(model, layout, range(12)))
    assert not hasattr(small.config, "quantization_config")
    assert (small.config.num_hidden_layers, small.config.num_attention_heads) == (2, 1)
    assert record_of(small.config)["blocks"] == {"encoder.layer": [0, 2]}
    again = drop(small, layout_of(small), "encoder.layer", [1])
    assert record_of(small.config)["blocks"] == {"encoder.layer": [2]}
    assert places(again.axes["encoder.layer.0.heads"]) == 12


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("bert", {HIDDEN: range(16)}, "a hidden width of 16 with 3 heads of 8 places .* heads times places"),
        ("llama", {HIDDEN: range(20)}, r"transformers refuses these sizes.*20.* not a multiple of .* heads \(6\)"),
        ("llama", {HIDDEN: [0, 24]}, r"'hidden' has units 0..23, asked to keep \[0, 24\]"),
        ("llama", {HIDDEN: []}, r"'hidden' has units 0..23, asked to keep \[\]"),
        ("llama", {"model.layers.1.columns": [0]}, "asks for intermediate_size 1, an axis before it for 29"),
    ],
)
def test_what_no_stock_config_tells_is_refused(name, keep, message):
    model = TINY[name].build()
    with pytest.raises(LayoutError, match=message):
        narrow(model, layout_of(model), keep)


def test_a_model_with_widths_of_its_own_is_refused():
    model, layout = build("bert")
    layout = layout.cut(model, "encoder.layer.0.columns", [0])
    with pytest.raises(LayoutError, match="widths of its own in some blocks"):
        narrow(model, layout, {})
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(LayoutError, match="already quantized"):
        narrow(model, layout, {})
