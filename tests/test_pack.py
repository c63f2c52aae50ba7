"""Pack: layers that gain by it are packed, the others are left and told, and what was packed loads bit for bit."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import checkpoint
from compress.contract import GRID, MASKS, Part, stale_after
from compress.errors import ExportError, LayoutError, TargetError
from compress.families import layout_of
from compress.plan import Plan, Tables
from compress.record import record_of
from compress.runtimes import open_artifact
from compress.sparse.modules import SparseLinear, as_nodes
from compress.sparse.semi import SemiInt4
from compress.target import Target
from exporters import EXPORTERS
from exporters.onnx import Onnx
from passes import PASSES
from passes.packing import gate
from passes.packing.pack import Pack, in_runs
from passes.quantization.qat import Qat
from passes.quantization.rounded import on_grid
from tests.conftest import TINY, answer
from tests.paper import state_of
from tests.world import make_world

WAYS = ({"format": "blocks"}, {"format": "bitmap"}, {"format": "bitmap", "values": "bfloat16"})
FAMILIES = [(name, WAYS[0]) for name in TINY] + [(name, way) for name in ("bert", "gpt2", "llama") for way in WAYS[1:]]
EXPORTED = [*(("bert", way) for way in WAYS), ("gpt2", WAYS[1]), ("llama", WAYS[0])]
QUICK = {"seconds": 0.01}


def told(case: object) -> str:
    return "-".join(case.values()) if isinstance(case, dict) else str(case)


def sparse_state(name: str, folder, block: int = 1):
    """A tiny model with most weights zero, its biases random."""
    options = {"sparsity": 0.8, "method": "magnitude", "samples": 8, "block": block}
    (state,) = PASSES["sparsify"](**options).run(state_of(TINY[name], folder))
    return state


def packed(state) -> dict[str, SparseLinear]:
    return {name: one for name, one in state.model.named_modules() if isinstance(one, SparseLinear)}


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=told)
def test_a_packed_model_computes_the_same_and_loads_bit_for_bit(name: str, options: dict, tmp_path) -> None:
    state, inputs = sparse_state(name, tmp_path), TINY[name].example()
    exact = answer(state.model, inputs)
    masks = state.facts[MASKS.name]
    (state,) = Pack(gain=0, **options, **QUICK).run(state)
    layers = packed(state)
    assert {f"{layer}.weight" for layer in layers} == masks.keys()
    assert {one.format for one in layers.values()} == {options["format"]}
    met = answer(state.model, inputs)
    if options == {"format": "bitmap"}:
        torch.testing.assert_close(met, exact, rtol=1e-3, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(met, exact, dim=0) > 0.95
    checkpoint.save(state.model, tmp_path / "saved")
    loaded = type(state.model).from_pretrained(tmp_path / "saved").eval()
    ours, theirs = state.model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(held, theirs[key]) and held.dtype == theirs[key].dtype for key, held in ours.items())
    assert torch.equal(answer(loaded, inputs), met)
    assert layout_of(loaded) == state.layout
    assert record_of(loaded.config)["sparse"].keys() == record_of(state.model.config)["sparse"].keys()


@pytest.mark.parametrize("options", WAYS, ids=told)
def test_stored_bytes_are_those_of_the_file(options: dict, tmp_path) -> None:
    state = sparse_state("bert", tmp_path)
    (state,) = Pack(gain=0, **options, **QUICK).run(state)
    checkpoint.save(state.model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    names = tuple(f"{name}." for name in packed(state))
    sizes = [one.numel() * one.element_size() for key, one in stored.items()
             if key.startswith(names) and not key.endswith("bias")]  # fmt: skip
    assert state.figures["stored_bytes"]["after"] == sum(sizes)


def test_blocks_are_for_zeros_in_runs(tmp_path) -> None:
    for block, expected in ((1, "bitmap"), (4, "blocks")):
        state = sparse_state("qwen2", tmp_path / str(block), block)
        (state,) = Pack(gain=0, **QUICK).run(state)
        assert {told["format"] for told in state.figures["layers"].values()} == {expected}
    assert in_runs(torch.zeros(2, 8))
    assert not in_runs(torch.eye(8))


def test_a_layer_that_does_not_gain_stays_dense_and_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "encoder.layer.1.output.dense"

    def timed(candidates, widths, rows, threads, seconds):
        assert set(candidates) == {"packed", "dense", "dense_int8"}
        assert rows == 3 * 7
        took = {"packed": 1.0, "dense": 3.0, "dense_int8": 2.0}
        return {kind: {name: 2.5 if (name, kind) == (slow, "packed") else took[kind] for name in calls}
                for kind, calls in candidates.items()}  # fmt: skip

    monkeypatch.setattr(gate, "milliseconds", timed)
    state = sparse_state("bert", tmp_path)
    state.target = state.target.model_copy(update={"batch": 3, "sequence": 7})
    before = {name: one.clone() for name, one in state.model.state_dict().items()}
    (state,) = Pack(format="blocks").run(state)
    assert state.figures["skipped"] == {slow: "packed it is 0.80 times as fast as dense; expected 1"}
    assert len(packed(state)) == len(state.figures["layers"]) - 1
    left = state.model.get_submodule(slow)
    assert torch.equal(left.weight, before[f"{slow}.weight"])
    told = state.figures["layers"]["encoder.layer.0.output.dense"]
    assert (told["gain"], told["packed"]) == (2.0, True)
    assert told["milliseconds"] == {"packed": 1.0, "dense": 3.0, "dense_int8": 2.0}


def test_every_layer_is_timed(tmp_path) -> None:
    (state,) = Pack(gain=1e9, format="blocks", **QUICK).run(sparse_state("gpt2", tmp_path))
    assert packed(state) == {}
    assert state.figures["skipped"].keys() == state.figures["layers"].keys()
    for told in state.figures["layers"].values():
        assert all(0 < took < 1e3 for took in told["milliseconds"].values())
        assert told["zeros"] == pytest.approx(0.8, abs=0.02)
    assert state.figures["stored_bytes"] == {"before": 0, "after": 0}
    assert "sparse" not in record_of(state.model.config)


def test_what_was_not_made_sparse_or_is_shared_is_left(tmp_path) -> None:
    state = sparse_state("llama", tmp_path)
    first, second = (state.model.get_submodule(f"model.layers.{index}.mlp.down_proj") for index in (0, 1))
    second.weight = first.weight
    state.facts[MASKS.name].pop("model.layers.2.mlp.up_proj.weight")
    (state,) = Pack(gain=0, **QUICK).run(state)
    assert state.figures["skipped"] == {
        "model.layers.0.mlp.down_proj": "its matrix is that of model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.down_proj": "its matrix is that of model.layers.0.mlp.down_proj",
        "model.layers.2.mlp.up_proj": "it was not made sparse",
    }


def test_a_packed_decoder_writes_as_it_reads(tmp_path) -> None:
    state = sparse_state("llama", tmp_path)
    (state,) = Pack(gain=0, format="bitmap", **QUICK).run(state)
    words = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    inputs = {name: value[:1] for name, value in TINY["llama"].example().items()}
    cached, uncached = (state.model.generate(**inputs, **words, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("key", ["places", "starts", "bits"])
def test_a_file_whose_indices_point_outside_is_refused(key: str, tmp_path) -> None:
    state = sparse_state("bert", tmp_path)
    (state,) = Pack(gain=0, format="bitmap" if key == "bits" else "blocks", **QUICK).run(state)
    checkpoint.save(state.model, tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    stored = load_file(file)
    name = f"encoder.layer.1.output.dense.{key}"
    stored[name].view(-1)[-1] = 12345
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=r"encoder\.layer\.1\.output\.dense: "):
        type(state.model).from_pretrained(tmp_path / "saved")


def on_int8_grid(folder):
    """A tiny sparse model whose weights training has left on a grid of int8, in runs of four."""
    state = sparse_state("bert", folder, block=4)
    state.dense.source = "dense"
    with on_grid(state, Qat(samples=8)):
        pass
    return state


def test_codes_are_those_of_training_on_a_grid(tmp_path) -> None:
    state = on_int8_grid(tmp_path)
    grid = state.facts[GRID.name]
    weights = {name: state.model.get_submodule(name).weight.detach().clone() for name in grid["layers"]}
    least = min(float((one / grid[f"{name}.scale"]).min()) for name, one in weights.items())
    assert round(least) == -128  # a code that no matrix rounded by itself has
    (state,) = Pack(gain=0, format="blocks", **QUICK).run(state)
    assert packed(state)
    for name, layer in packed(state).items():
        assert torch.equal(layer.packed().unpack(), weights[name])
    assert not set(state.facts[GRID.name]["layers"]) & packed(state).keys()


def test_where_all_is_packed_tables_alone_are_left_to_int8(tmp_path) -> None:
    state = on_int8_grid(tmp_path)
    grid = state.facts[GRID.name]
    grid["layers"] = [name for name in grid["layers"] if f"{name}.weight" in state.facts[MASKS.name]]
    (state,) = Pack(gain=0, format="blocks", **QUICK).run(state)
    made = Onnx(quantize="int8_static").run(state, tmp_path / "made")
    assert made.figures["int8_products"] == 0
    assert made.figures["int8_tables"] > 0


def test_layers_left_dense_leave_by_the_grid_that_they_were_trained_on(tmp_path, monkeypatch) -> None:
    def timed(candidates, widths, rows, threads, seconds):
        return {kind: {name: 2.0 if kind == "dense" else 1.0 if "intermediate" in name else 3.0 for name in calls}
                for kind, calls in candidates.items()}  # fmt: skip

    monkeypatch.setattr(gate, "milliseconds", timed)
    (state,) = Pack(format="blocks").run(on_int8_grid(tmp_path))
    ours = len(packed(state))
    assert 0 < ours < len(state.figures["layers"])
    made = Onnx(quantize="int8_static").run(state, tmp_path / "made")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "made" / "model.onnx").graph.node)
    assert kinds["BlockSparseLinear"] == ours
    assert made.figures["int8_products"] > 0
    assert made.worst_error < 0.1


# ONNX.


def exported(name: str, options: dict, folder, cache: bool = False):
    """A packed tiny model and its artifact."""
    state = sparse_state(name, folder)
    state.dense.source = "dense"
    (state,) = Pack(gain=0, **options, **QUICK).run(state)
    return state, Onnx(cache=cache).run(state, folder / "made")


@pytest.mark.parametrize(("name", "options"), EXPORTED, ids=told)
def test_an_artifact_of_a_packed_model_computes_the_same(name: str, options: dict, tmp_path) -> None:
    state, made = exported(name, options, tmp_path, cache=TINY[name].generates)
    assert made.worst_error < (0.05 if options["format"] == "blocks" else 1e-4)
    graph = onnx.load(tmp_path / "made" / "model.onnx").graph
    kind = {"blocks": "BlockSparseLinear", "bitmap": "BitmapSparseLinear"}[options["format"]]
    ours = [node for node in graph.node if node.domain == "hf_compress"]
    assert [node.op_type for node in ours] == [kind] * len(packed(state))
    assert not any(one.as_node for one in packed(state).values())


@pytest.mark.parametrize("threads", [1, 2])
def test_stock_onnx_runtime_needs_the_library_alone(threads: int, tmp_path) -> None:
    state, _ = exported("bert", {"format": "blocks"}, tmp_path)
    folder = shutil.copytree(tmp_path / "made", tmp_path / "elsewhere")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with pytest.raises(Exception, match="hf_compress"):
        onnxruntime.InferenceSession(folder / "model.onnx", options)
    options.register_custom_ops_library(str(folder / "libhf_compress.so"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    inputs = TINY["bert"].example(3, 11)
    feed = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}
    met = torch.from_numpy(session.run(None, feed)[0])[inputs["attention_mask"].bool()].flatten()
    torch.testing.assert_close(met, answer(state.model, inputs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("part", "said"),
    [("places", "past the inputs"), ("starts", "starts"), ("order", "an output"), ("bits", "bits"), ("bias", "bias")],
)
def test_a_graph_whose_indices_point_outside_is_refused(part: str, said: str, tmp_path) -> None:
    exported("bert", {"format": "bitmap" if part == "bits" else "blocks"}, tmp_path)
    file = tmp_path / "made" / "model.onnx"
    graph = onnx.load(file)
    node = next(node for node in graph.graph.node if node.domain == "hf_compress")
    place = {"order": 1, "starts": 2, "places": 3, "bits": 1, "bias": 7}[part]
    (held,) = (one for one in graph.graph.initializer if one.name == node.input[place])
    array = onnx.numpy_helper.to_array(held).copy()
    if part == "bias":
        array = array[1:]
    else:
        array.reshape(-1)[-1] = -1 if part == "bits" else 12345
    held.CopyFrom(onnx.numpy_helper.from_array(array, held.name))
    onnx.save(graph, file)
    with pytest.raises(TargetError, match=said):
        open_artifact(tmp_path / "made", Target())


def test_a_plan_knows_what_packing_needs_and_that_nothing_may_follow(tmp_path) -> None:
    make_world(tmp_path)
    head = {"model": str(tmp_path / "my-encoder"), "data": {"source": str(tmp_path / "reviews.txt")}}

    def problems(*passes: object) -> list[str]:
        return Plan.read({**head, "passes": list(passes), "export": ["huggingface"]}, Tables(PASSES, EXPORTERS)).check()

    assert problems("sparsify", "pack") == []
    assert any("masks" in problem for problem in problems("pack"))
    assert any("has fixed the number format" in problem for problem in problems("sparsify", "pack", "distill"))
    assert problems("sparsify", {"distill": {"qat": {}}}, "pack") == []
    assert Pack().touches == Part.FORMAT
    assert stale_after(Pack(), frozenset({MASKS})) == {MASKS}


def test_medians_are_of_calls_in_turn() -> None:
    order: list[str] = []
    calls = {kind: {name: lambda x, said=f"{kind} {name}": order.append(said) for name in ("a", "b")}
             for kind in ("packed", "dense")}  # fmt: skip
    times = gate.milliseconds(calls, {"a": 3, "b": 4}, 2, 1, 0.0)
    assert order[:8] == ["packed a", "packed b", "dense a", "dense b"] * 2
    assert len(order) == 4 * 6
    assert np.isfinite([took for found in times.values() for took in found.values()]).all()


def test_on_a_gpu_formats_of_sixteen_bits_are_timed_and_packed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def timed(packed, layers, rows, kind, seconds):
        asked.update(rows=rows, kind=kind, formats={one.name for one in packed.values()})
        return {way: dict.fromkeys(packed, took) for way, took in {"packed": 1.0, "dense": 3.0}.items()}

    monkeypatch.setattr(gate, "milliseconds_on_gpu", timed)
    for options, kind in (({}, "bitmap"), ({"format": "semi_int4"}, "semi_int4")):
        state, inputs = state_of(TINY["llama"], tmp_path / kind), TINY["llama"].example()
        (state,) = PASSES["sparsify"](runs={"keep": 2, "of": 4}, method="magnitude", samples=8).run(state)
        exact = answer(state.model, inputs)
        state.target = state.target.model_copy(update={"device": "cuda", "batch": 3, "generate": 5})
        (state,) = Pack(**options).run(state)
        assert asked == {"rows": 3, "kind": torch.bfloat16, "formats": {kind}}
        assert {told["gain"] for told in state.figures["layers"].values()} == {3.0}
        met = answer(state.model, inputs)
        assert torch.nn.functional.cosine_similarity(met, exact, dim=0) > 0.95
        checkpoint.save(state.model, tmp_path / kind / "saved")
        loaded = type(state.model).from_pretrained(tmp_path / kind / "saved", dtype=torch.bfloat16).eval()
        ours, theirs = (dict(one.named_parameters()) for one in (state.model, loaded))
        held = {name for name in ours if name.endswith((".values", ".scale", ".codes", ".positions", ".bits"))}
        assert held
        assert all(torch.equal(ours[name], theirs[name]) for name in held)


def test_options_that_do_not_suit_the_device_are_told(tmp_path) -> None:
    state = sparse_state("bert", tmp_path)
    with pytest.raises(TargetError, match="format 'semi_int4' on device 'cpu'; expected auto or bitmap or blocks"):
        list(Pack(format="semi_int4").run(state))
    state.target = state.target.model_copy(update={"device": "cuda"})
    with pytest.raises(TargetError, match="format 'blocks' on device 'cuda'; expected auto or bitmap or semi_int4"):
        list(Pack(format="blocks").run(state))
    with pytest.raises(TargetError, match="values 'float32' on device 'cuda'"):
        list(Pack(values="float32").run(state))


def test_layers_without_two_of_four_are_left_and_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "milliseconds_on_gpu", lambda packed, *_: {"packed": {}, "dense": {}})
    state = sparse_state("bert", tmp_path)
    state.target = state.target.model_copy(update={"device": "cuda"})
    masks = state.facts[MASKS.name]
    (state,) = Pack(format="semi_int4").run(state)
    assert set(state.figures["skipped"].values()) == {"more than two of four inputs have weights; expected two at most"}
    assert {f"{name}.weight" for name in state.figures["skipped"]} == masks.keys()


def test_a_format_without_a_node_is_no_onnx() -> None:
    layer = torch.nn.Sequential(SparseLinear(SemiInt4.pack(torch.zeros(4, 64)), None))
    with (
        pytest.raises(ExportError, match="packed as semi_int4 can't be in ONNX; expected bitmap or blocks"),
        as_nodes(layer),
    ):
        pass
