"""Decoders in deployment: one graph with a cache writes what transformers writes, and whole requests are timed."""

from __future__ import annotations

import copy
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import onnx_ir
import pytest
import torch
from transformers import DynamicCache

from compress import latency, measure
from compress.errors import ExportError, TargetError
from compress.families import layout_of
from compress.latency import table
from compress.outcome import _told
from compress.parts import captured, cut, part
from compress.report import wording
from compress.report.schema import Measured
from compress.runtimes import RUNTIMES, open_artifact
from compress.target import Target
from compress.tasks import TASKS
from exporters import EXPORTERS
from passes import PASSES
from tests.conftest import TINY
from tests.paper import state_of

ONNX = RUNTIMES["onnxruntime"]
DECODERS = tuple(name for name, tiny in TINY.items() if "Causal" in tiny.auto)
QUICK = ("llama", "gpt2")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS]


def uneven(name, **entries):
    """A tiny decoder whose layers differ: fewer heads in the first, none in the second where it may have none."""
    model = TINY[name].build(**entries)
    layout = layout_of(model)
    for axis, keep in zip([one for one in layout.axes.values() if one.kind == "heads"], ([1], []), strict=False):
        if len(keep) >= axis.least:
            layout = layout.cut(model, axis.name, keep)
    return model


def exported(model, folder, **options):
    dense = SimpleNamespace(source=None)
    state = SimpleNamespace(model=model, tokenizer=None, task=TASKS["text-generation"], dense=dense, target=Target())
    return EXPORTERS["onnx"](**options).run(state, folder, {})


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Gives the cut decoder of a name with its graph, made once: the exporter has compared what both generate."""

    @cache
    def made(name):
        model, folder = uneven(name), tmp_path_factory.mktemp(name) / "onnx"
        return model, exported(model, folder), folder

    return made


@pytest.fixture(params=FAMILIES)
def artifact(request, artifacts):
    return artifacts(request.param)


def followed(model, prompt, count):
    """The likeliest tokens, each from one run of all before it, without a cache."""
    ids = torch.as_tensor(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :].numpy()


def test_one_graph_serves_the_prompt_and_every_step(artifact, tmp_path):
    model, written, folder = artifact
    assert written.worst_error < 1e-4
    assert ONNX.generates(folder)
    session = open_artifact(folder, Target())
    shapes = {value.name: value.shape for value in session.inputs}
    kept = {layer for layer in range(model.config.num_hidden_layers) if f"past_key_values.{layer}.key" in shapes}
    attending = {axis.block for axis in layout_of(model).axes.values() if axis.kind == "heads" and axis.units}
    assert len(kept) == len(attending)
    assert shapes["past_key_values.0.key"][:3] == ["batch", 1, "past_sequence"]
    assert shapes["attention_mask"] == ["batch", "total_sequence"]
    prompt = np.random.default_rng(0).integers(3, 50, size=(2, 7))
    np.testing.assert_array_equal(session.generate(prompt, 9), followed(model, prompt, 9))
    model.save_pretrained(tmp_path)
    twin = open_artifact(tmp_path, Target(runtime="torch"))
    np.testing.assert_array_equal(twin.generate(prompt, 9), session.generate(prompt, 9))


def test_padding_before_a_text_changes_nothing(artifact):
    session = open_artifact(artifact[2], Target())
    prompt = np.random.default_rng(1).integers(3, 50, size=(1, 5))
    padded = {"input_ids": np.pad(prompt, ((0, 0), (4, 0))), "attention_mask": np.pad(prompt > 0, ((0, 0), (4, 0)))}
    padded["attention_mask"] = padded["attention_mask"].astype(np.int64)
    plain = {"input_ids": prompt, "attention_mask": np.ones_like(prompt)}
    np.testing.assert_allclose(session(padded)["logits"][:, 4:], session(plain)["logits"], atol=1e-4)


def test_slow_norms_are_taken_apart(artifact):
    kinds = {node.op_type for node in onnx_ir.load(artifact[2] / "model.onnx").graph}
    assert not {kind for kind in kinds if kind.startswith("Skip")}


def test_requests_are_timed_in_both_runtimes(artifacts, tmp_path):
    model, _, folder = artifacts("llama")
    model.save_pretrained(tmp_path)
    for path, runtime in ((folder, "onnxruntime"), (tmp_path, "torch")):
        target = Target(runtime=runtime, sequence=4, generate=16)
        (timing,) = measure.measure([path], target, seconds=0.1)
        assert target.tokens_per_second(timing.milliseconds) == pytest.approx(16e3 / timing.milliseconds)
        assert timing.milliseconds > 16 * 0.02  # no runtime gives a token in less


def test_a_graph_that_generates_otherwise_is_an_export_error(artifact):
    model, _, folder = artifact
    other = copy.deepcopy(model)
    other.get_output_embeddings().weight.data[7] *= 1.01
    session = open_artifact(folder, Target())
    assert EXPORTERS["onnx"]()._generated(model, session) < 1e-4
    with pytest.raises(ExportError, match=r"generating 8 tokens from 1 x 6, .* expected the model's own"):
        EXPORTERS["onnx"]()._generated(other, session)


def test_models_without_a_cache_are_refused(tmp_path):
    for name in ("bert", "t5", "vit"):
        model = TINY[name].build()
        with pytest.raises(ExportError, match="with a cache; expected cache: false"):
            ONNX.build(model, TINY[name].example(), tmp_path, cache=True)
    TINY["bert"].build().save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="no key-value cache"):
        open_artifact(tmp_path, Target(runtime="torch")).generate(np.ones((1, 4), dtype=np.int64), 2)
    assert Target(generate=2).problems("fill-mask") == [
        "generate: 2 tokens asked of a model for fill-mask; expected null, or task text-generation"
    ]
    assert Target(generate=2).problems("text-generation") == []


@pytest.mark.parametrize("name", DECODERS)
def test_a_cut_block_makes_a_cache_of_its_own(name):
    model = TINY[name].build()
    layout = layout_of(model)
    block = next(axis.block for axis in layout.axes.values() if axis.kind == "heads")
    inputs = TINY[name].example(1, 9)
    cache = DynamicCache()
    before = captured(model, {block}, inputs, cache)[block]
    one = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    after = captured(model, {block}, one, cache)[block]
    for heads in (3, 1):
        module = cut(model, layout, block, {f"{block}.heads": heads})
        step = part(module, after, before)
        keys, values = step.inputs[-2:]
        assert keys.shape[1:3] == values.shape[1:3] == (heads, 9)
        longer = step(*step.inputs)[-2]
        assert torch.equal(longer[:, :, :9], keys)
        assert longer.shape[2] == 10
        assert part(module, before).inputs[-1].shape[2] == 0


@pytest.mark.parametrize("runtime", ["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_a_table_tells_the_time_of_requests(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.1)
    monkeypatch.setattr(latency, "MOST_MEASURED", 2)
    monkeypatch.setattr(latency, "MOST_HEADS", 2)
    model = uneven("gpt2")
    layout, target = layout_of(model), Target(runtime=runtime, sequence=6, generate=9)
    inputs = TINY["gpt2"].example(1, 6)
    times = table(model, layout, target, inputs, tmp_path)
    assert times.curves.keys() == {axis.name for axis in layout.axes.values() if axis.units}
    (_, prompt, none), (count, after, before) = latency._requests(model, layout, target, inputs)
    assert (count, none) == (8, None)
    for block, call in after.items():
        assert (prompt[block].tensors[0].shape[1], call.tensors[0].shape[1]) == (6, 1)
        assert before[block].tensors[0].shape[1] == 6 + 4


def test_reports_tell_tokens_a_second():
    timing = measure.Timing.of([400.0] * 10)
    told = _told(timing, Target(generate=20, batch=3))
    assert told["tokens_per_second"] == 150.0
    assert wording.took(Measured(**told)) == "400 ms, 150 tokens/s"
    assert wording.took(Measured(**_told(timing, Target()))) == "400 ms"


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_pass_shortens_requests(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.5)
    monkeypatch.setattr(latency, "MOST_MEASURED", 3)
    monkeypatch.setattr(measure, "measure", partial(measure.measure, seconds=0.5))
    state = state_of(TINY["gpt2"], tmp_path)
    state.target = Target(runtime=runtime, sequence=6, generate=9)
    (cut_model,) = PASSES["prune"](speedups=[1.0], prior="relative", max_corrections=0).run(state)
    assert cut_model.figures["measured"] > 0
    assert set(cut_model.figures["sizes"]) == set(state.layout.axes)


def test_texts_longer_than_the_model_takes_are_refused(tmp_path):
    state = state_of(TINY["gpt2"], tmp_path)
    state.target = Target(runtime="torch", sequence=30, generate=11)
    with pytest.raises(TargetError, match="make 41 tokens; this model takes 40 at most"):
        state.dense_artifact()
