"""Exporters: what they write is read back, equals the model, and is there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from compress.errors import ExportError, TargetError
from compress.families import layout_of
from compress.plan import Plan, Tables
from compress.runner import Run, prepare
from compress.runtimes import open_artifact
from compress.runtimes.onnx import OnnxSession
from compress.target import Target
from compress.tasks import TASKS
from exporters import EXPORTERS
from exporters.base import Exporter
from passes import PASSES
from tests.conftest import TINY
from tests.world import make_world

ALONE = [name for name, cls in EXPORTERS.items() if issubclass(cls, Exporter)]  # the others leave it to these
CARD = {
    "promised_speedup": 2.0,
    "parameters": 12345,
    "quality": {"cosine": 0.98},
    "steps": [{"pass": "ziplm", "options": {"speedups": [2.0]}}],
}


@pytest.fixture
def state(tmp_path):
    model = TINY["bert"].build(num_hidden_layers=2)
    layout = layout_of(model)
    layout = layout.cut(model, "encoder.layer.0.heads", [1])
    layout = layout.cut(model, "encoder.layer.1.columns", [])
    source = tmp_path / "somewhere" / "dense-model"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]))
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    words = {"[PAD]": 0, "[UNK]": 1, "word": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    dense = SimpleNamespace(source=str(source))
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, layout=layout, task=TASKS["feature-extraction"], dense=dense, target=Target()
    )


@pytest.mark.parametrize("name", ["huggingface", "onnx", "openvino"])
def test_artifact_is_whole_and_equals_the_model(name, state, tmp_path):
    folder = tmp_path / "out" / name
    artifact = EXPORTERS[name]().run(state, folder, CARD)
    assert artifact.kind == name
    assert artifact.worst_error < 1e-4
    assert artifact.bytes == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert [path.name for path in folder.parent.iterdir()] == [name]
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    inputs = TINY["bert"].example(3, 7)
    with torch.no_grad():
        expected = state.model(**inputs).last_hidden_state.numpy()
    met = open_artifact(folder, Target())(inputs)["last_hidden_state"]
    np.testing.assert_allclose(met, expected, atol=1e-4)
    assert artifact.intact()
    (folder / "config.json").write_text("{}")
    assert not artifact.intact()


def test_a_broken_artifact_is_written_over(state, tmp_path):
    for _ in range(2):
        assert EXPORTERS["huggingface"]().run(state, tmp_path / "out", CARD).intact()
        (tmp_path / "out" / "config.json").write_text("{}")


def test_model_card_tells_the_plan_and_no_path(state, tmp_path):
    artifact = EXPORTERS["huggingface"]().run(state, tmp_path / "out", CARD)
    assert artifact.worst_error == 0.0
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "feature-extraction"
    plan = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(plan) == {"passes": [{"ziplm": {"speedups": [2.0]}}]}
    assert "| parameters | 12,345 |" in body
    assert "import compress\nfrom transformers import BertModel" in body
    assert "dense-model" in body
    assert "somewhere" not in text


@pytest.mark.parametrize("name", ALONE)
def test_unwritable_place_is_an_export_error(name, state, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ExportError, match="can't be written"):
        EXPORTERS[name]().run(state, blocked / "out")
    assert blocked.is_file()


@pytest.mark.parametrize("name", ALONE)
def test_foreign_folders_are_left_alone(name, state, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ExportError, match="no exported model"):
        EXPORTERS[name]().run(state, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_disagreeing_graph_is_thrown_away(state, tmp_path, monkeypatch):
    honest = OnnxSession.__call__
    monkeypatch.setattr(
        OnnxSession, "__call__", lambda self, inputs: {k: v + 1 for k, v in honest(self, inputs).items()}
    )
    with pytest.raises(ExportError, match="'last_hidden_state' differs by 1"):
        EXPORTERS["onnx"]().run(state, tmp_path / "out" / "onnx")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("quantize", "largest"), [("int8", 0.6), ("int4", 0.45)])
def test_openvino_rounds_weights(quantize, largest, state, tmp_path):
    whole, less = (EXPORTERS["openvino"](quantize=kind).run(state, tmp_path / kind) for kind in ("none", quantize))
    sizes = [(tmp_path / kind / "openvino_model.bin").stat().st_size for kind in ("none", quantize)]
    assert sizes[1] < largest * sizes[0]
    assert (less.precision, whole.precision) == (quantize, "float32")
    assert whole.worst_error < 1e-4 < less.worst_error < 3
    with pytest.raises(ExportError, match="differs by"):
        EXPORTERS["openvino"](quantize=quantize, tolerance=1e-6).run(state, tmp_path / "strict")


def test_disagreeing_weights_are_thrown_away(state, tmp_path, monkeypatch):
    honest = transformers.BertModel.from_pretrained

    def altered(*args, **kwargs):
        model = honest(*args, **kwargs)
        model.embeddings.word_embeddings.weight.data += 1e-6
        return model

    monkeypatch.setattr(transformers.BertModel, "from_pretrained", altered)
    with pytest.raises(ExportError, match="reads back otherwise"):
        EXPORTERS["huggingface"]().run(state, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_onnxruntime_names_what_to_install(state, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.runtimes.base.find_spec", lambda name: None)
    with pytest.raises(TargetError, match="pip install 'hf-compress'"):
        EXPORTERS["onnx"]().run(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_openvino_gives_back_what_costs_too_much(tmp_path):
    make_world(tmp_path)
    data = {"source": str(tmp_path / "reviews.txt"), "validation_rows": 16}
    plan = {"model": str(tmp_path / "my-encoder"), "data": data, "passes": ["calibrate"], "export": []}
    state = Run(Plan.read(plan, Tables(PASSES, EXPORTERS)), prepare(tmp_path / "out", fresh=False)).state(None)
    loose, strict = (
        EXPORTERS["openvino"](quantize="int8_accuracy", max_drop=drop, samples=4).run(state, tmp_path / f"{drop}")
        for drop in (0.5, 1e-7)
    )
    assert (loose.precision, loose.figures["score_before"]) == ("int8_accuracy", pytest.approx(1))
    assert min(loose.figures["scores_tried"]) < 1 - 1e-7
    assert len(strict.figures["scores_tried"]) > len(loose.figures["scores_tried"])
    less, all_of_them = (
        (Path(one.path) / "openvino_model.xml").read_text().count('type="FakeQuantize"') for one in (strict, loose)
    )
    assert less < all_of_them
    assert strict.worst_error < loose.worst_error


@pytest.mark.parametrize(
    ("options", "message"),
    [({"group": 8}, "'group' is for quantize: int4"), ({"max_drop": 0.1}, "'max_drop' is for quantize: int8_accuracy")],
)
def test_openvino_refuses_options_of_another_precision(options, message):
    with pytest.raises(ValidationError, match=message):
        EXPORTERS["openvino"](quantize="int8", **options)
