"""Runtimes: an artifact computes what the model computes, on shapes its export never saw."""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from transformers import Cache

from compress.errors import ExportError, TargetError
from compress.families import layout_of
from compress.runtimes import RUNTIMES, example_inputs, open_artifact, runtime_of
from compress.runtimes.onnx import OnnxRuntime
from compress.runtimes.torch import cache_argument, uncached
from compress.runtimes.tracing import DYNAMIC, widened
from compress.target import Target
from tests.conftest import GENERATING, TINY

QUICK = ("bert", "llama", "gpt2", "vit")  # one of each kind; the rest of the table takes minutes
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
ONNX, TORCH = RUNTIMES["onnxruntime"], RUNTIMES["torch"]


def assert_same(session, model, inputs):
    """All outputs agree, at the places that are no padding, up to ten times what float32 costs torch itself.

    The large weights of tiny models make much of little: a gated T5 loses 4e-4 in torch's own float32.
    """
    met = session(inputs)
    exact = copy.deepcopy(model).double()
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        outputs, precise = model(**inputs, **uncached(model)), exact(**doubles, **uncached(exact))
    expected = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    assert expected.keys() <= met.keys()
    for name, value in expected.items():
        values, mask = [torch.from_numpy(met[name]), value, precise[name]], inputs.get("attention_mask")
        if mask is not None and value.ndim > 2 and value.shape[:2] == mask.shape:
            values = [one[mask.bool()] for one in values]
        found, single, double = (one.double() for one in values)
        allowed = 2e-4 + 10 * float((single - double).abs().max())
        torch.testing.assert_close(
            found, double, rtol=2e-4, atol=allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_equals_torch_on_other_shapes(name, tmp_path):
    tiny = TINY[name]
    model = tiny.build().train()
    for stack, blocks in layout_of(model).stacks.items():
        layout_of(model).drop(model, stack, range(min(2, blocks.length)))  # each block takes a second to export
    before = model.config.to_dict()
    session = open_artifact(ONNX.build(model, tiny.example(2, 9), tmp_path), Target())
    assert model.training
    assert model.config.to_dict() == before
    model.eval()
    for value in session.inputs:
        names = DYNAMIC[value.name]
        assert value.shape[: len(names)] == list(names)
    assert_same(session, model, tiny.example(3, 14))
    assert_same(session, model, tiny.example(1, 6))
    assert not any("." in output for output in session.outputs)  # as the parts of a cache have
    assert session(session.example(2, 7)).keys() == set(session.outputs)
    if name == "bert":
        assert_no_slow_norm_comes_back(tmp_path)


@pytest.mark.parametrize("name", QUICK)
def test_what_an_emptied_layer_adds_is_not_repeated_for_each_token(name, tmp_path):
    model = TINY[name].build()
    layout = layout_of(model)
    for stack in layout.stacks:
        layout.drop(model, stack, range(2))
    layout = layout_of(model)
    for axis in [axis for axis in layout.axes.values() if axis.units and not axis.least][-2:]:
        layout = layout.cut(model, axis.name, [])
        for site in axis.readers:
            if (bias := getattr(model.get_submodule(site.module), "bias", None)) is not None:
                torch.nn.init.normal_(bias)
    session = open_artifact(ONNX.build(model, TINY[name].example(2, 9), tmp_path), Target())
    assert_same(session, model, TINY[name].example(3, 14))
    graph = onnx_ir.load(tmp_path / "model.onnx").graph
    repeats = [node for node in graph if node.op_type == "Expand" and node.inputs[0].is_initializer()]
    assert not [node for node in repeats if node.inputs[0].const_value.shape.rank() == 1]


@pytest.mark.parametrize("name", [one if one == "bert" else pytest.param(one, marks=pytest.mark.slow) for one in QUICK])
def test_openvino_equals_torch_on_other_shapes(name, tmp_path):
    model = TINY[name].build()
    session = open_artifact(RUNTIMES["openvino"].build(model, TINY[name].example(2, 9), tmp_path), Target())
    assert not session.fixed
    first = session(TINY[name].example(3, 14))
    kept = {output: value.copy() for output, value in first.items()}
    assert_same(session, model, TINY[name].example(3, 14))
    assert_same(session, model, TINY[name].example(1, 6))
    assert all(np.array_equal(value, first[output]) for output, value in kept.items())
    assert session(session.example(2, 7)).keys() == set(session.outputs)
    with pytest.raises(TargetError, match="has no key-value cache"):
        session.generate(np.ones((1, 3), np.int64), 2)
    with pytest.raises(ExportError, match="have no key-value cache"):
        RUNTIMES["openvino"].build(model, TINY[name].example(2, 9), tmp_path, cache=True)


def assert_no_slow_norm_comes_back(folder):
    """That the runtime fuses none when it opens the graph in `folder`."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "opened.onnx")
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx_ir.load(options.optimized_model_filepath).graph]
    assert "LayerNormalization" in kinds
    assert "SkipLayerNormalization" not in kinds


@pytest.mark.parametrize("name", QUICK)
def test_example_of_size_one_stays_open(name):
    for value in widened(example_inputs(TINY[name].build(), None, 1, 8)).values():
        assert value.shape[0] == 2


@pytest.mark.parametrize("name", TINY)
def test_example_inputs_run_and_repeat(name):
    model = TINY[name].build()
    inputs, again = example_inputs(model, None, 2, 9), example_inputs(model, None, 2, 9)
    assert all(torch.equal(again[key], value) for key, value in inputs.items())
    with torch.no_grad():
        model(**inputs)
    if "input_ids" in inputs and not hasattr(model.config, "relative_attention_num_buckets"):
        assert example_inputs(model, None, 1, 9999)["input_ids"].shape[1] <= 40
        model(**example_inputs(model, None, 1, 9999))


def test_torch_artifact_equals_the_model(tmp_path):
    model, inputs = TINY["bert-classifier"].build(), TINY["bert-classifier"].example()
    session = open_artifact(TORCH.build(model, inputs, tmp_path), Target(runtime="torch"))
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    np.testing.assert_array_equal(session(inputs)["logits"], expected)
    assert session(session.example(2, 5))["logits"].shape == (2, 2)


def test_artifacts_are_told_apart_by_their_files(tmp_path):
    with pytest.raises(TargetError, match="no such file"):
        runtime_of(tmp_path / "none")
    with pytest.raises(TargetError, match=r"holds nothing; expected model\.onnx"):
        runtime_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert runtime_of(tmp_path) is TORCH
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "openvino_model.xml").touch()
    assert runtime_of(tmp_path / "openvino") is RUNTIMES["openvino"]
    (tmp_path / "model.onnx").touch()
    assert runtime_of(tmp_path) is ONNX
    assert runtime_of(tmp_path / "model.onnx") is ONNX


def test_broken_artifacts_are_named(tmp_path):
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(TargetError, match=r"model\.onnx: ONNX Runtime can't open it"):
        open_artifact(tmp_path, Target())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "openvino_model.xml").write_text("no graph")
    with pytest.raises(TargetError, match=r"openvino_model\.xml: OpenVINO can't open it"):
        open_artifact(tmp_path / "bare", Target())
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    (folder / "model.safetensors").touch()
    with pytest.raises(TargetError, match="architectures names 'NoSuchModel'"):
        open_artifact(folder, Target())


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_missing_package_names_what_to_install(runtime, monkeypatch):
    assert runtime.missing() is None
    monkeypatch.setattr("compress.runtimes.base.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=rf"pip install 'hf-compress{re.escape(runtime.extra)}'"):
        runtime.require()


def test_openvino_sends_no_usage_data():
    script = """
from compress.runtimes.openvino import OpenVino
OpenVino().require()
import openvino, nncf
from openvino.tools.ovc import telemetry_utils
print(type(nncf.telemetry.telemetry).__name__, telemetry_utils.tm.__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["MagicMock", "openvino.tools.ovc.telemetry_stub"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
def test_cuda_without_a_gpu_is_an_error(tmp_path):
    TINY["bert"].build().save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="device"):
        TORCH.open(tmp_path, Target(device="cuda"))
    with pytest.raises(TargetError, match="CUDAExecutionProvider"):
        OnnxRuntime().open(tmp_path / "model.onnx", Target(device="cuda"))


@pytest.mark.parametrize("name", GENERATING)
def test_a_cache_is_given_by_the_name_it_comes_back_with(name):
    model, inputs = TINY[name].build(), TINY[name].example(2, 9)
    kept = cache_argument(model)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[kept]
    assert isinstance(cache, Cache)
    assert kept in inspect.signature(model.forward).parameters
