"""Artifacts of lower precision: int8 runs in int8, near the model, is judged by itself, and goes if it doesn't pay."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from pydantic import ValidationError

from compress import compress, outcome
from compress.evaluate.opened import Opened
from compress.families import layout_of
from compress.measure import Timing
from compress.report import check
from compress.runtimes import open_artifact
from compress.runtimes.onnx import OnnxRuntime
from compress.target import Target
from compress.tasks import TASKS
from compress.verdict import KeepIf
from exporters import EXPORTERS, precision
from exporters.onnx import Onnx
from exporters.surgery import as_matmul, narrow_tables
from tests.conftest import TINY
from tests.paper import Texts
from tests.world import make_world

WAYS = {  # options: the largest relative error, and the operator that computes its products
    "fp16": ({"quantize": "fp16"}, 2e-2, "MatMul"),
    "bf16": ({"quantize": "bf16"}, 2e-1, "MatMul"),
    "dynamic": ({"quantize": "int8_dynamic"}, 0.3, "MatMulInteger"),
    "minmax": ({"quantize": "int8_static"}, 0.3, "DequantizeLinear"),
    "percentile": ({"quantize": "int8_static", "ranges": "percentile"}, 0.3, "DequantizeLinear"),
    "entropy": ({"quantize": "int8_static", "ranges": "entropy", "samples": 8}, 0.5, "DequantizeLinear"),
    "qoperator": ({"quantize": "int8_static", "form": "qoperator"}, 0.5, "QLinearMatMul"),
}


def state_of(name: str) -> SimpleNamespace:
    tiny = TINY[name]
    model = tiny.build(num_hidden_layers=1)
    task = TASKS["text-generation" if tiny.generates else "feature-extraction"]
    dense = SimpleNamespace(source="dense", model=model)
    return SimpleNamespace(
        facts={},
        model=model,
        tokenizer=None,
        layout=layout_of(model),
        task=task,
        dense=dense,
        target=Target(),
        data=Texts(tiny),
    )


def operators(folder: Path) -> Counter:
    """How often each operator is in a graph."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.fixture
def built(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export each model once; what these tests are about comes afterwards."""
    build, home = OnnxRuntime.build, tmp_path_factory.getbasetemp() / "built"

    def once(self: OnnxRuntime, model: Any, inputs: Any, folder: Path, **options: Any) -> Path:
        kept = home / f"{model.config.model_type}-{model.config.hidden_size}"
        if not kept.exists():
            kept.mkdir(parents=True)
            build(self, model, inputs, kept, **options)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        return folder

    monkeypatch.setattr(OnnxRuntime, "build", once)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("name", "way"), [*(("bert", way) for way in WAYS), ("llama-tied", "dynamic"), ("llama-tied", "minmax")]
)
def test_what_is_quantized_is_there_is_smaller_and_near_the_model(name: str, way: str, tmp_path: Path) -> None:
    options, allowed, operator = WAYS[way]
    state = state_of(name)
    whole = Onnx().run(state, tmp_path / "whole")
    made = Onnx(**options).run(state, tmp_path / "made")
    assert made.precision == options["quantize"]
    assert whole.precision == "float32"
    assert made.bytes < whole.bytes
    inputs = TINY[name].example(3, 7)
    expected, met = (open_artifact(tmp_path / folder, Target())(inputs) for folder in ("whole", "made"))
    first = next(iter(expected))
    mask = inputs["attention_mask"].numpy().astype(bool)
    error = np.abs(met[first][mask] - expected[first][mask]).max()
    assert 0 < error <= allowed * np.abs(expected[first]).max()
    assert operators(tmp_path / "made")[operator] >= 4
    if "int8" in options["quantize"]:
        assert made.figures["skipped"] == {}
        assert made.figures["int8_products"] >= 4
        weights = onnx.load(tmp_path / "made" / "model.onnx").graph.initializer
        floats = [one for one in weights if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) == 2]
        assert all(min(one.dims) == 1 or np.prod(one.dims) < 1024 for one in floats)  # but for scales and positions


@pytest.mark.parametrize("name", ["bert-classifier", "llama-tied", "mpnet"])
def test_products_are_written_alike_and_compute_the_same(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    OnnxRuntime().build(tiny.build(num_hidden_layers=1), tiny.example(), tmp_path)
    inputs = tiny.example(3, 7)
    expected = open_artifact(tmp_path, Target())(inputs)
    model = ir.load(tmp_path / "model.onnx")
    as_matmul(model.graph)
    left = [node for node in model.graph if node.op_type in ("Gemm", "FusedMatMul") and node.inputs[1].const_value]
    assert left == []
    precision.save(model, tmp_path)
    met = open_artifact(tmp_path, Target())(inputs)
    for output, value in expected.items():
        np.testing.assert_allclose(met[output], value, rtol=1e-4, atol=1e-4)


def test_a_row_of_a_table_errs_by_half_of_its_own_step_at_most() -> None:
    table = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    table[3] *= 1e4  # one scale for all rows would leave nothing of the others
    table[5] = 0
    tensor = ir.tensor(table, name="table")
    value = ir.Value(name="table", const_value=tensor, shape=ir.Shape(table.shape), type=ir.TensorType(tensor.dtype))
    ids = ir.Value(name="ids", shape=ir.Shape([40]), type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("Gather", [value, ids])
    node.outputs[0].name = "rows"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([ids], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}, name="one")
    assert narrow_tables(graph) == 1
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    (rows,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"ids": np.arange(40)})
    assert (np.abs(rows - table).max(1) <= 0.501 * np.abs(table).max(1) / 127).all()


@pytest.mark.usefixtures("built")
def test_weights_take_seven_bits_where_eight_would_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "machine", lambda: {"flags": ["avx2"], "system": "Linux x86_64"})
    made = Onnx(quantize="int8_dynamic").run(state_of("bert"), tmp_path / "made")
    assert made.figures["weight_bits"] == 7
    codes = [
        onnx.numpy_helper.to_array(one, str(tmp_path / "made"))
        for one in onnx.load(tmp_path / "made" / "model.onnx").graph.initializer
        if one.data_type == onnx.TensorProto.INT8 and "_quantized" in one.name
    ]
    assert codes
    assert max(np.abs(one.astype(int)).max() for one in codes) <= 64


@pytest.mark.usefixtures("built")
def test_an_open_artifact_stands_for_the_model(tmp_path: Path) -> None:
    state = state_of("bert")
    Onnx().run(state, tmp_path / "made")
    inputs = TINY["bert"].example(3, 7)
    met = Opened(open_artifact(tmp_path / "made", Target()), state.model.config)(**inputs)
    with torch.no_grad():
        expected = state.model(**inputs)
    torch.testing.assert_close(met.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("asked", "ratio", "scores", "lower", "kept"),
    [
        ({"speedup": 1.02}, 1.02, (None, None), False, True),
        ({"speedup": 1.02}, 1.01, (0.9, 0.9), False, False),
        ({"speedup": 1.02}, None, (0.9, 0.9), False, False),
        ({"max_drop": 0.01}, None, (0.9, 0.8911), False, True),
        ({"max_drop": 0.01}, 2.0, (0.9, 0.8909), False, False),
        ({"max_drop": 0.01}, 2.0, (10.0, 10.09), True, True),
        ({"max_drop": 0.01}, 2.0, (10.0, 10.11), True, False),
        ({"max_drop": 0.01}, 2.0, (10.0, None), True, False),
        ({"speedup": 1.5, "max_drop": 0.0}, 1.6, (0.5, 0.6), False, True),
    ],
)
def test_the_verdict(asked: dict, ratio: float | None, scores: tuple, lower: bool, kept: bool) -> None:
    met, reason = KeepIf(**asked).verdict(ratio, "score", scores, lower)
    assert met is kept
    assert reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": "entropy"}, "'ranges' is for quantize: int8_static, met quantize: none"),
        ({"quantize": "int8_dynamic", "samples": 4}, "'samples' is for quantize: int8_static"),
        ({"keep_if": {"speedup": 1.1}}, "this is not quantized"),
        ({"quantize": "int4"}, "int8_dynamic"),
    ],
)
def test_options_that_contradict_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EXPORTERS["onnx"](**options)


@pytest.mark.usefixtures("built")
def test_what_does_not_pay_is_put_aside_with_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_world(tmp_path)
    quick = {"onnx-int8_dynamic": 1.0, "onnx-int8_static": 9.0, "onnx-int8_static-2": 2.0, "onnx": 10.0}

    def paper(artifacts: list[Path], target: Target) -> list[Timing]:
        return [Timing.of([quick.get(path.name, 10.0)] * 10) for path in artifacts]

    monkeypatch.setattr(outcome, "measure", paper)
    plan = {
        "model": str(tmp_path / "my-encoder"),
        "data": {"source": str(tmp_path / "reviews.txt")},
        "passes": ["calibrate"],
        "export": [
            "onnx",
            {"onnx": {"quantize": "int8_dynamic", "keep_if": {"speedup": 2, "max_drop": 0.5}}},
            {"onnx": {"quantize": "int8_static", "keep_if": {"speedup": 2}, "samples": 4}},
            {"onnx": {"quantize": "int8_static", "keep_if": {"max_drop": 0}, "samples": 4, "ranges": "entropy"}},
        ],
    }
    result = compress(plan=plan, out=tmp_path / "out")
    check(result.report)
    (branch,) = result.report["branches"]
    whole, dynamic, slow, coarse = branch["artifacts"]
    assert [one["kept"] for one in branch["artifacts"]] == [True, True, False, False]
    assert whole["quality"] == branch["quality"]
    assert dynamic["measured_speedup"] == 10.0
    assert 0.9 < dynamic["quality"]["cosine"] < 1.0
    assert "1.11x as fast, 2x asked" in slow["reason"]
    assert "cosine" in coarse["reason"]
    assert (tmp_path / "out" / "onnx-int8_dynamic" / "model.onnx").is_file()
    assert sorted(path.name for path in (tmp_path / "out").glob("onnx*")) == ["onnx", "onnx-int8_dynamic"]
    assert all(artifact.intact() for artifact in result.artifacts)
    assert "put aside; 1.11x as fast" in (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    written = (tmp_path / "out" / "onnx-int8_dynamic" / "model.onnx").stat().st_mtime_ns
    again = json.loads((compress(plan=plan, out=tmp_path / "out").folder / "report.json").read_text())
    assert again["branches"] == result.report["branches"]
    assert (tmp_path / "out" / "onnx-int8_dynamic" / "model.onnx").stat().st_mtime_ns == written
