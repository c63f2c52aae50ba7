"""Folding: what is shared is one tensor everywhere, norms and deltas are private, and gates rank blocks."""

from __future__ import annotations

import copy
import dataclasses

import onnx_ir
import pytest
import torch
from onnxruntime import InferenceSession

from compress import checkpoint
from compress.errors import LayoutError
from compress.families import layout_of
from compress.lowrank import LowRank
from compress.record import own_record, prefix_of, record_of
from compress.runtimes import RUNTIMES
from compress.runtimes.graph import share_weights
from compress.sharing import cure_, matrices, share_
from passes.pruning.depth.fold import Fold, partition
from passes.pruning.depth.gates import gate, gated, similarities, train_gates
from tests.conftest import TINY, answer, assert_one_model, precise
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
CURED = ("bert", "llama-tied", "gpt2")  # those that distillation takes, with each kind of linear
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
    return {
        prefix_of(model) + block: prefix_of(model) + source
        for block, source in record_of(model.config)["shared"].items()
    }


def assert_shared(model, sharing):
    for block, source in sharing.items():
        mine, theirs = (matrices(model.get_submodule(name)) for name in (block, source))
        assert mine
        assert mine.keys() == theirs.keys()
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
    plain, told = type(model).from_pretrained(
        tmp_path / "once", attn_implementation=deep.attentions[0], output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    checkpoint.save(plain, tmp_path / "twice")
    again = type(model).from_pretrained(tmp_path / "twice", attn_implementation=deep.attentions[0]).eval()
    for one in (plain, again, copy.deepcopy(model), state.branch().model):
        assert_shared(one, sharing)
        assert one.config.quantization_config == model.config.quantization_config
        assert layout_of(one) == state.layout
        assert_one_model(one, model, deep.example())


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
    assert_one_model(loaded, model, TINY["llama"].example())
    assert layout_of(loaded) == layout


@pytest.mark.parametrize(
    ("similar", "size", "runs"),
    [
        ([0.1, 0.2, 0.9, 0.3], 2, [range(2), range(2, 4)]),  # more groups before better ones
        ([0.1, 0.2, 0.9], 2, [range(1, 3)]),
        ([0.9, 0.8, 0.1, 0.2, 0.3], 2, [range(2), range(3, 5)]),
        ([0.1, 0.2, 0.3, 0.9, 0.4], 3, [range(2, 5)]),
        ([0.5], 2, []),
    ],
)
def test_groups_are_many_first_and_alike_second(similar, size, runs):
    fits = [[True] * len(similar)] * len(similar)
    assert partition(similar, size, fits) == runs
    fewer = partition(similar, size, fits, 1)
    assert len(fewer) == min(1, len(runs))
    assert all(sum(similar[r.start + 1 : r.stop]) <= sum(similar[f.start + 1 : f.stop]) for r in runs for f in fewer)


def test_blocks_of_other_shapes_are_not_grouped(tmp_path):
    state = state_of(TINY["llama"], tmp_path)
    state.model = TINY["llama"].build(num_hidden_layers=5)
    state.layout = layout_of(state.model)
    state.cut("model.layers.2.columns", range(20))
    with pytest.raises(LayoutError, match=r"2 like neighbours asked.*the stacks have 5 blocks"):
        fold(state)
    with pytest.raises(LayoutError, match=r"'layers\.2' and 'layers\.1' differ in shape"):
        share_(state.model, own_record(state.model), {"layers.2": "layers.1"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 3}, "3 like neighbours asked.*the stacks have 4 blocks"),
        ({"remove": 3}, "3 blocks asked, 2 stand between"),
    ],
)
def test_what_cannot_be_folded_is_refused(options, message, tmp_path):
    with pytest.raises(LayoutError, match=message):
        fold(state_of(DEEP["bert"], tmp_path), **options)


def test_a_folded_model_is_not_folded_again(tmp_path):
    state = fold(state_of(DEEP["bert"], tmp_path))
    with pytest.raises(LayoutError, match="is folded already"):
        fold(state)


def test_curing_asks_for_something_to_cure():
    with pytest.raises(ValueError, match="group: 1 shares none; expected cure: 0"):
        Fold(group=1, cure=4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_shut_gate_is_the_block_dropped_and_an_open_one_the_block(name):
    model, inputs = DEEP[name].build(), DEEP[name].example()
    layout, ((stack, _),) = layout_of(model), layout_of(model).stacks.items()
    blocks = [model.get_submodule(f"{stack}.{index}") for index in (1, 2)]
    expected = precise(model, inputs)
    gates = gate(torch.tensor([0.0, 1e9]), 1e-4)
    with gated(blocks, gates):
        shut = precise(model, inputs)
    with gated(blocks, torch.ones(2)):
        opened = precise(model, inputs)
    torch.testing.assert_close(opened, expected, rtol=1e-9, atol=1e-9)
    layout.drop(model, stack, [0, 2, 3])
    torch.testing.assert_close(shut, precise(model, inputs), rtol=1e-9, atol=1e-9)


def identity(model, layout, block):
    """Zero the output projections of a block, which then gives what it got."""
    for axis in layout.axes.values():
        if axis.block == block:
            layout.silence(model, axis.name, range(axis.units))
            for site in axis.readers:
                module = model.get_submodule(site.module)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)


@pytest.mark.parametrize("rank", ["gates", "cosine"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_block_that_does_nothing_goes_first_and_costs_nothing(name, rank, tmp_path):
    state = state_of(DEEP[name], tmp_path)
    stack = next(iter(state.layout.stacks))
    identity(state.model, state.layout, f"{stack}.2")
    expected = precise(state.model, DEEP[name].example())
    fold(state, group=1, remove=1, rank=rank, gate_steps=40)
    assert state.figures["removed"] == [f"{stack}.2"]
    torch.testing.assert_close(precise(state.model, DEEP[name].example()), expected, rtol=1e-9, atol=1e-9)


def test_gates_know_what_one_block_makes_up_for():
    """Blocks 1 and 2 undo each other, so their outputs differ most from their inputs, and both may go together."""
    model = TINY["llama"].build(num_hidden_layers=5, attention_bias=True, mlp_bias=True)
    layout = layout_of(model)
    for index, push in ((1, 3.0), (2, -3.0)):
        identity(model, layout, f"model.layers.{index}")
        torch.nn.init.constant_(model.model.layers[index].mlp.down_proj.bias, push)
    blocks = list(model.model.layers[1:4])
    batches = [TINY["llama"].example(4)]
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    openness = train_gates(model, blocks, batches, steps=30, learning_rate=0.05, penalty=0.1)
    assert max(openness[:2]) < openness[2]
    alike = similarities(model, blocks, batches)
    assert min(alike[:2]) < alike[2]
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("name", CURED)
def test_curing_starts_from_the_shared_model_and_lowers_the_tail_loss(name, tmp_path):
    shared = fold(state_of(DEEP[name], tmp_path)).model
    state = state_of(DEEP[name], tmp_path)
    fold(state, cure=2, cure_steps=1, cure_learning_rate=1e-30)
    assert torch.equal(answer(state.model, DEEP[name].example()), answer(shared, DEEP[name].example()))
    state = state_of(DEEP[name], tmp_path / "cured")
    before = {name: one.clone() for name, one in shared.state_dict().items()}
    asked = [one.requires_grad for one in shared.parameters()]
    fold(state, cure=2, cure_steps=20, cure_learning_rate=1e-2)
    assert state.figures["loss_after"] < 0.95 * state.figures["loss_before"]
    model = state.model
    assert_shared(model, shared_names(model))
    layers = [module for module in model.modules() if isinstance(module, LowRank)]
    assert layers
    assert all(layer.up.abs().sum() > 0 and layer.up.shape[1] == 2 for layer in layers)
    assert len({id(layer.up) for layer in layers}) == len(layers)
    norms = {path for path, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 1}
    for path, one in model.state_dict().items():
        if path in before and path.rpartition(".")[0] not in norms:
            assert torch.equal(one, before[path]), path
    assert [one.requires_grad for one in shared.parameters()] == asked
    checkpoint.save(model, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    assert_one_model(loaded, model, DEEP[name].example())
    assert loaded.config.quantization_config == model.config.quantization_config


@pytest.mark.slow
def test_an_onnx_graph_holds_shared_matrices_once(tmp_path):
    state = fold(state_of(DEEP["bert"], tmp_path))
    inputs = DEEP["bert"].example()
    RUNTIMES["onnxruntime"].build(state.model, inputs, tmp_path)
    file = tmp_path / "model.onnx"
    weights = [one.const_value for one in onnx_ir.load(file).graph.initializers.values()]
    one_block = sum(one.nbytes for one in matrices(state.model.encoder.layer[1]).values())
    assert sum(one.nbytes for one in weights) < 4 * parameters(state.model) + one_block / 4
    assert len({(tuple(one.shape), one.tobytes()) for one in weights}) == len(weights)
    (first, *_) = InferenceSession(file).run(None, {name: one.numpy() for name, one in inputs.items()})
    mask = inputs["attention_mask"].bool()
    expected = answer(state.model, inputs)
    torch.testing.assert_close(torch.from_numpy(first)[mask].flatten(), expected, rtol=1e-3, atol=1e-3)


def test_equal_weights_of_a_graph_become_one():
    same, other = torch.arange(6.0).reshape(2, 3), torch.ones(3, 2)
    tensors = {"a": same, "b": same.clone(), "turned": same.reshape(3, 2), "across": other.T.contiguous().T}
    values = {
        name: onnx_ir.val(name, const_value=onnx_ir.tensor(one.numpy(), name=name)) for name, one in tensors.items()
    }
    nodes = [onnx_ir.node("Identity", [value]) for value in values.values()]
    graph = onnx_ir.Graph([], [], nodes=nodes, initializers=list(values.values()))
    share_weights(graph)
    assert list(graph.initializers) == ["a", "turned", "across"]
    assert [node.inputs[0].name for node in nodes] == ["a", "a", "turned", "across"]
