"""Folding: what is shared is one tensor everywhere, norms and deltas are private, and gates rank blocks."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from onnxruntime import InferenceSession

from compress import checkpoint
from compress.errors import LayoutError
from compress.families import layout_of
from compress.layout import own_record, prefix_of, record_of
from compress.lowrank import LowRank
from compress.runtimes import RUNTIMES
from compress.sharing import cure_, matrices, share_
from passes import PASSES
from passes.pruning.fold import Fold, partition
from passes.pruning.gates import gate, gated, similarities, train_gates
from tests.conftest import TINY, answer
from tests.paper import state_of

DEPTHS = {
    "distilbert": {"n_layers": 4},
    "gpt2": {"n_layer": 4},
    "whisper": {"encoder_layers": 4, "decoder_layers": 4},
    "gemma3_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "t5": {"num_layers": 4, "num_decoder_layers": 4},
}
DEEP = {
    name: dataclasses.replace(
        tiny, entries={**tiny.entries, **DEPTHS.get(tiny.kind, {"num_hidden_layers": 4})}
    )
    for name, tiny in TINY.items()
}  # fmt: skip
CURED = ("bert", "bert-classifier", "llama-tied", "gpt2")  # those that distillation takes, with each kind of linear
BARE = {"group": 2, "cure": 0, "samples": 4}


def fold(state, **options):
    *_, last = Fold(**{**BARE, **options}).run(state)
    return last


def parameters(model):
    return sum(one.numel() for one in model.parameters())


def make_alike(model):
    """Let the second inner block of every stack compute what the first does."""
    for name in layout_of(model).stacks:
        first, second = (model.get_submodule(f"{name}.{index}") for index in (1, 2))
        second.load_state_dict(first.state_dict())


def shared_names(model):
    return {prefix_of(model) + block: prefix_of(model) + source for block, source in record_of(model.config)["shared"].items()}


def assert_shared(model, sharing):
    for block, source in sharing.items():
        mine, theirs = (matrices(model.get_submodule(name)) for name in (block, source))
        assert mine.keys() == theirs.keys() and mine
        assert all(mine[name] is theirs[name] for name in mine)


@pytest.fixture(params=DEEP)
def deep(request):
    return DEEP[request.param]


def test_a_group_of_one_is_the_model_as_it_was(tmp_path):
    state = state_of(DEEP["llama"], tmp_path)
    before = {name: one.clone() for name, one in state.model.state_dict().items()}
    after = fold(state, group=1).model
    assert all(torch.equal(one, before[name]) for name, one in after.state_dict().items())
    assert "shared" not in record_of(after.config)


def test_two_identical_neighbours_share_without_loss(deep, tmp_path):
    state = state_of(deep, tmp_path)
    make_alike(state.model)
    expected, count = answer(state.model, deep.example()), parameters(state.model)
    fold(state)
    groups = state.figures["groups"]
    assert len(groups) == len(state.layout.stacks)
    assert torch.equal(answer(state.model, deep.example()), expected)
    saved = sum(one.numel() for group in groups for one in matrices(state.model.get_submodule(group[0])).values())
    assert parameters(state.model) == count - saved


def test_what_is_shared_is_stored_once_and_loads_shared(deep, tmp_path):
    state = state_of(deep, tmp_path)
    checkpoint.save(state.model, tmp_path / "dense")
    model = fold(state).model
    sharing = shared_names(model)
    assert sharing
    assert_shared(model, sharing)
    checkpoint.save(model, tmp_path / "once")
    weights = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("dense", "once")]
    bytes_shared = sum(4 * one.numel() for block in sharing for one in matrices(model.get_submodule(block)).values())
    assert weights[0] - weights[1] >= bytes_shared
    loaded, _ = checkpoint.load(tmp_path / "once", state.task if "Model" == deep.auto[-5:] else None)
    plain = type(model).from_pretrained(tmp_path / "once", attn_implementation=deep.attentions[0]).eval()
    checkpoint.save(plain, tmp_path / "twice")
    again = type(model).from_pretrained(tmp_path / "twice", attn_implementation=deep.attentions[0]).eval()
    for one in (plain, again, copy.deepcopy(model), state.branch().model):
        assert_shared(one, sharing)
        assert one.config.quantization_config == model.config.quantization_config
        assert layout_of(one) == state.layout
        assert torch.equal(answer(one, deep.example()), answer(model, deep.example()))
    assert_shared(loaded, shared_names(loaded))


def test_norms_stay_private(tmp_path):
    model = fold(state_of(DEEP["llama"], tmp_path)).model
    first, second = model.model.layers[1], model.model.layers[2]
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight
    assert first.input_layernorm.weight is not second.input_layernorm.weight


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_shared_blocks_are_not_cut(name, tmp_path):
    state = fold(state_of(DEEP[name], tmp_path))
    folded = {*shared_names(state.model), *shared_names(state.model).values()}
    for axis in state.layout.axes.values():
        inside = any(site.module.startswith(f"{block}.") for site in axis.sites for block in folded)
        for change in (state.layout.cut, state.layout.silence):
            if inside:
                with pytest.raises(LayoutError, match="whose matrices are shared; expected cuts before folding"):
                    change(state.model, axis.name, [0])
            else:
                change(copy.deepcopy(state.model), axis.name, [0])


@pytest.mark.parametrize(
    ("keep", "shared", "cured"),
    [
        ([0, 2, 3, 4, 5], {"layers.2": "layers.1"}, {"layers.1": 2, "layers.2": 2}),  # the source goes
        ([0, 1, 3, 5], {"layers.2": "layers.1"}, {"layers.1": 2, "layers.2": 2}),  # one that takes goes
        ([0, 1, 4, 5], None, {"layers.1": 2}),  # one is left
        ([0, 4, 5], None, None),
    ],
)
def test_dropping_blocks_of_a_group_keeps_the_rest_shared(keep, shared, cured, tmp_path):
    model = TINY["llama"].build(num_hidden_layers=6)
    record = own_record(model)
    share_(model, record, {"layers.2": "layers.1", "layers.3": "layers.1"})
    cure_(model, record, dict.fromkeys(["layers.1", "layers.2", "layers.3"], 2))
    layout = layout_of(model).drop(model, "model.layers", keep)
    assert record_of(model.config).get("shared") == shared
    assert record_of(model.config).get("cured") == cured
    checkpoint.save(model, tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert_shared(loaded, {f"model.{block}": f"model.{source}" for block, source in (shared or {}).items()})
    inputs = TINY["llama"].example()
    assert torch.equal(answer(loaded, inputs), answer(model, inputs))
    assert layout_of(loaded) == layout
