"""The laws of cutting, for every axis and stack of every family."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import LayoutError
from compress.families import layout_of
from compress.layout import Layout
from compress.record import record_of
from compress.runtimes.torch import cache_argument
from tests.conftest import GENERATING, TINY, answer, precise


@cache
def dense(name: str, attention: str | None = None) -> tuple[PreTrainedModel, Layout]:
    """A tiny model that nobody may change, and its layout."""
    model = TINY[name].build(attention)
    return model, layout_of(model)


def case(name: str, attention: str | None = None) -> tuple[PreTrainedModel, Layout, dict[str, Tensor]]:
    model, layout = dense(name, attention)
    return copy.deepcopy(model), layout, TINY[name].example()


def same(one: Tensor, other: Tensor) -> None:
    assert one.isfinite().all()
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def mixed(model: PreTrainedModel, layout: Layout) -> Layout:
    """Cut all axes in several ways, some away, and drop a block of each stack."""
    for index, (name, axis) in enumerate(layout.axes.items()):
        ways: list[Any] = [range(1, axis.units), [0], []]
        keep = ways[index % 3]
        layout = layout.cut(model, name, keep if len(keep) >= axis.least else [0])
    for name, stack in layout.stacks.items():
        layout = layout.drop(model, name, [index for index in range(stack.length) if index != 1])
    return layout


AXES = [(name, axis) for name in TINY for axis in dense(name)[1].axes]
STACKS = [(name, stack) for name in TINY for stack in dense(name)[1].stacks]
ATTENTIONS = [(name, attention) for name, tiny in TINY.items() for attention in tiny.attentions]


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_cutting_a_unit_equals_silencing_it(name: str, axis: str) -> None:
    _, layout, inputs = case(name)
    units = layout.axes[axis].units
    for lost in ([0], [1, units - 1], list(range(units))):
        keep = [unit for unit in range(units) if unit not in lost]
        if len(keep) < layout.axes[axis].least:
            continue
        cut, silenced = case(name)[0], case(name)[0]
        layout.cut(cut, axis, keep)
        layout.silence(silenced, axis, lost)
        same(precise(cut, inputs), precise(silenced, inputs))
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in silenced.parameters())
    for parameter in case(name)[0].get_submodule(layout.axes[axis].readers[0].module).parameters():
        assert parameter.abs().sum() > 0, "silencing zeros would prove nothing"


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_all_axes_cut_equal_all_silenced(name: str, attention: str) -> None:
    cut, layout, inputs = case(name, attention)
    silenced, _, _ = case(name, attention)
    whole = answer(cut, inputs)
    after = layout
    for axis in layout.axes.values():
        after = after.cut(cut, axis.name, [0, 2])
        layout.silence(silenced, axis.name, [unit for unit in range(axis.units) if unit not in (0, 2)])
    same(precise(cut, inputs), precise(silenced, inputs))
    assert (answer(cut, inputs) - whole).abs().max() > 1e-3
    assert {axis.units for axis in after.axes.values()} == {2}


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_two_cuts_are_one(name: str, axis: str) -> None:
    once, layout, _ = case(name)
    twice, _, _ = case(name)
    units = layout.axes[axis].units
    one = layout.cut(once, axis, [units - 1])
    two = layout.cut(twice, axis, range(1, units)).cut(twice, axis, [units - 2])
    assert one == two
    assert record_of(once.config) == record_of(twice.config)
    for (_, left), (_, right) in zip(once.named_parameters(), twice.named_parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", TINY)
def test_a_cut_model_tells_its_own_layout(name: str) -> None:
    model, layout, _ = case(name)
    assert layout_of(model) == layout
    after = mixed(model, layout)
    assert layout_of(model) == after
    for axis in after.axes.values():
        for path, attribute, per_unit in axis.attributes if axis.units else ():
            assert getattr(model.get_submodule(path), attribute) == per_unit * axis.units


def step_over(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """What a block gives if its states leave as they came."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_dropping_a_block_equals_stepping_over_it(name: str, stack: str) -> None:
    _, layout, inputs = case(name)
    length, anchored = layout.stacks[stack].length, layout.stacks[stack].anchored
    for gone in range(anchored, length):
        dropped, stepping = case(name)[0], case(name)[0]
        after = layout.drop(dropped, stack, [index for index in range(length) if index != gone])
        stepping.get_submodule(f"{stack}.{gone}").register_forward_hook(step_over, with_kwargs=True)
        same(precise(dropped, inputs), precise(stepping, inputs))
        assert after == layout_of(dropped)
        indices = [getattr(module, "layer_idx", None) for module in dropped.get_submodule(stack).modules()]
        assert {index for index in indices if index is not None} in (set(), set(range(length - 1)))


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("beams", [1, 2])
def test_cached_generation_equals_uncached(name: str, beams: int) -> None:
    model, layout, inputs = case(name)
    mixed(model, layout)
    model.generation_config.max_length = None
    inputs = {key: value[:1] for key, value in inputs.items()}
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams}
    cached, fresh = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, fresh)


def test_stepping_with_a_cache_and_no_positions_equals_one_call() -> None:
    model, layout, inputs = case("llama")
    for name, axis in layout.axes.items():
        layout = layout.cut(model, name, range(axis.least))
    model, ids = model.double(), inputs["input_ids"][:1]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], **{cache_argument(model): first[cache_argument(model)]}).logits
    same(torch.cat([first.logits, rest], dim=1), whole)


def test_the_origins_of_blocks_are_recorded_over_two_drops() -> None:
    model, layout, _ = case("gemma3")
    layout.drop(model, "model.layers", [0, 2]).drop(model, "model.layers", [1])
    assert record_of(model.config)["blocks"] == {"layers": [2]}
    assert model.config.num_hidden_layers == 1
    assert model.config.layer_types == ["sliding_attention"]


@pytest.mark.parametrize(
    ("axis", "keep", "message"),
    [
        ("encoder.layer.1.head", [0], r"no axis 'encoder.layer.1.head'.*did you mean 'encoder.layer.1.heads'"),
        ("encoder.layer.1.heads", [0, 3], r"axis 'encoder.layer.1.heads' has 3 units, asked for 0..3"),
        ("encoder.layer.1.heads", [-1], r"has 3 units, asked for -1..-1"),
    ],
)
def test_a_cut_that_cannot_be_made_says_why(axis: str, keep: list[int], message: str) -> None:
    model, layout, inputs = case("bert")
    before = answer(model, inputs)
    with pytest.raises(LayoutError, match=message):
        layout.cut(model, axis, keep)
    assert torch.equal(before, answer(model, inputs))


@pytest.mark.parametrize(
    ("name", "axis"),
    [("llama", "model.layers.0.heads"), ("gemma3", "model.layers.1.heads"), ("t5", "encoder.heads")],
)
def test_heads_that_others_lean_on_stay(name: str, axis: str) -> None:
    model, layout, _ = case(name)
    with pytest.raises(LayoutError, match=f"axis '{axis}' needs at least 1 of its 3 units, 0 asked"):
        layout.cut(model, axis, [])


@pytest.mark.parametrize(
    ("name", "stack", "keep", "message"),
    [
        ("bert", "encoder.layers", [0], "no stack 'encoder.layers'.*did you mean 'encoder.layer'"),
        ("bert", "encoder.layer", [], r"has blocks 0..2, asked to keep \[\]"),
        ("bert", "encoder.layer", [0, 3], r"has blocks 0..2, asked to keep \[0, 3\]"),
        ("t5", "decoder.block", [1], "the first 1 must stay"),
    ],
)
def test_a_drop_that_cannot_be_made_says_why(name: str, stack: str, keep: list[int], message: str) -> None:
    model, layout, _ = case(name)
    with pytest.raises(LayoutError, match=message):
        layout.drop(model, stack, keep)
    assert layout_of(model) == layout


def test_blocks_that_know_their_number_stay() -> None:
    model = TINY["gpt2"].build(scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(LayoutError, match="the first 3 must stay"):
        layout_of(model).drop(model, "transformer.h", [0, 2])


def test_units_that_went_cannot_be_silenced() -> None:
    model, layout, _ = case("bert")
    layout = layout.cut(model, "encoder.layer.0.heads", [])
    assert layout.cut(model, "encoder.layer.0.heads", []) is layout
    with pytest.raises(LayoutError, match="has 0 units, asked for 1"):
        layout.silence(model, "encoder.layer.0.heads", [1])


def test_a_block_without_heads_cannot_come_first_in_a_cache() -> None:
    model, layout, _ = case("llama")
    layout = layout.cut(model, "model.layers.1.heads", [])
    with pytest.raises(LayoutError, match=r"'model.layers.0.heads' would tell how long the cache is"):
        layout.drop(model, "model.layers", [1, 2])
    layout = layout.drop(model, "model.layers", [0, 1])
    assert (layout.axes["model.layers.0.heads"].least, layout.axes["model.layers.1.heads"].units) == (1, 0)


def test_a_quantized_model_is_not_cut() -> None:
    model, layout, _ = case("bert")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(LayoutError, match=r"already quantized \(bitsandbytes\)"):
        layout.cut(model, "encoder.layer.0.heads", [0])
    assert model.get_submodule("encoder.layer.0.attention.self").num_attention_heads == 3


def test_frozen_parameters_stay_frozen() -> None:
    model, layout, _ = case("bert")
    model.requires_grad_(False)
    mixed(model, layout)
    assert not any(parameter.requires_grad for parameter in model.parameters())
