"""Saving and loading: what was computed before is computed after, through plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers.trainer_utils import validate_quantization_for_training

import compress
from compress import checkpoint
from compress.errors import CompressError, DataError, ExportError, LayoutError
from compress.families import layout_of
from compress.record import record_of
from compress.tasks import TASKS
from tests.conftest import TINY, Tiny, answer, assert_one_model, precise
from tests.test_layout import mixed


def saved(name: str, folder: Path) -> transformers.PreTrainedModel:
    """A tiny model, cut in many ways and saved to the folder."""
    model = TINY[name].build()
    mixed(model, layout_of(model))
    checkpoint.save(model, folder)
    return model


@pytest.mark.parametrize("name", TINY)
def test_plain_from_pretrained_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model = saved(name, tmp_path / "once")
    auto = getattr(transformers, tiny.auto)
    for source, target in (("once", "twice"), ("twice", "thrice")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = auto.from_pretrained(tmp_path / source, attn_implementation=tiny.attentions[0])
        assert_one_model(loaded, model, tiny.example())
        assert layout_of(loaded) == layout_of(model)
        assert loaded.config.quantization_config == model.config.quantization_config
        loaded.save_pretrained(tmp_path / target)


def test_whoever_reads_the_config_reads_the_weights(tmp_path: Path) -> None:
    saved("bert", tmp_path / "model")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1


def test_a_fresh_process_needs_only_the_import(tmp_path: Path) -> None:
    model = saved("llama-tied", tmp_path / "model")
    program = f"""
import compress
import sys
assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import AutoModelForCausalLM, utils
utils.logging.disable_progress_bar()
import torch
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
print(model.double()(torch.arange(3, 12)[None]).logits.sum().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert float(done.stdout) == pytest.approx(model.double()(torch.arange(3, 12)[None]).logits.sum().item(), rel=1e-12)


def test_the_order_of_imports_does_not_matter() -> None:
    program = """
import transformers.quantizers.auto as auto
import compress, compress.hook
compress.hook.install()
assert "hf_compress" in auto.AUTO_QUANTIZER_MAPPING
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    saved("llama-tied", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"])
def test_a_model_loads_under_another_task(auto: str, tmp_path: Path) -> None:
    model = saved("bert-classifier", tmp_path / "model")
    other = getattr(transformers, auto).from_pretrained(tmp_path / "model")
    assert record_of(other.config)["sizes"] == record_of(model.config)["sizes"]
    inputs = TINY["bert"].example()
    states = [precise(part, inputs) for part in (model.bert, getattr(other, "bert", other))]
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


def test_a_loaded_model_is_an_ordinary_one(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "model")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "model", dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model = model.float().train()
    validate_quantization_for_training(model)
    ids = torch.arange(3, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    layout = layout_of(model)
    readers = [model.get_submodule(axis.readers[0].module) for axis in layout.axes.values() if axis.units]
    assert readers
    assert all(reader.weight.grad is not None for reader in readers)
    name = next(name for name, axis in layout.axes.items() if axis.units > 1)
    layout = layout.cut(model, name, [0])
    checkpoint.save(model, tmp_path / "again")
    assert layout_of(auto.from_pretrained(tmp_path / "again")) == layout


def test_load_gives_model_and_tokenizer(tmp_path: Path) -> None:
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "small", "fast"])}
    tokenizer = transformers.BertTokenizer(vocab=words)
    model = TINY["bert-classifier"].build()
    mixed(model, layout_of(model))
    checkpoint.save(model, tmp_path / "model", tokenizer)
    loaded, read = compress.load(tmp_path / "model")
    assert type(loaded) is type(model)
    assert read is not None
    assert read("small fast")["input_ids"] == tokenizer("small fast")["input_ids"]
    saved("bert", tmp_path / "bare")
    assert compress.load(tmp_path / "bare", TASKS["feature-extraction"])[1] is None


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved("bert", tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    tokenizer = transformers.BertTokenizer(vocab={"[UNK]": 0})
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    for folder in ("model", "new"):
        with pytest.raises(ExportError, match="can't be written: No space left on device"):
            checkpoint.save(model, tmp_path / folder, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_saving_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "model")
    (tmp_path / "model" / "stale.txt").write_text("from the model before")
    checkpoint.save(model, tmp_path / "model")
    assert not (tmp_path / "model" / "stale.txt").exists()
    with pytest.raises(ExportError, match="exists and is no model folder"):
        checkpoint.save(model, tmp_path)
    with pytest.raises(ExportError, match="exists and is no model folder"):
        checkpoint.save(model, tmp_path / "model" / "config.json")


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])


def forget_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.LayerNorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_record(**entries: object) -> object:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= entries
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "can't be read"),
        (forget_weights, "lacks 1 weights of its blocks, the first is encoder.layer.1.output.LayerNorm.weight"),
        (edit_record(sizes={}), "can't be loaded"),
        (edit_record(sizes={"encoder.layer.7.heads": 1}), "no axis 'encoder.layer.7.heads' in this model"),
        (edit_record(sizes={"encoder.layer.0.heads": 9}), r"has 3 units, asked for 0..8"),
        (edit_record(version=2), "the record of cuts has version 2; this hf-compress reads 1"),
        (lambda folder: (folder / "model.safetensors").unlink(), "can't be loaded"),
    ],
    ids=["truncated", "weights missing", "no sizes", "unknown axis", "too many units", "newer", "no weights"],
)
def test_a_damaged_folder_is_told_in_one_sentence(damage: object, message: str, tmp_path: Path) -> None:
    saved("bert", tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises((DataError, LayoutError), match=message) as caught:
        checkpoint.load(tmp_path / "model", TASKS["feature-extraction"])
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "minilm").mkdir()
    with pytest.raises(DataError, match="does not exist"):
        compress.load(tmp_path / "minilmm")
    with pytest.raises(DataError, match="has no config"):
        compress.load(tmp_path / "minilm")


def test_a_stranger_in_our_place_is_named(tmp_path: Path) -> None:
    compress.check_installation()
    stranger = tmp_path / "exporters"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("def export(): ...\n")
    program = f"import sys, compress; sys.path.insert(0, {str(tmp_path)!r}); compress.check_installation()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"CompressError: package 'exporters' at {stranger / '__init__.py'} isn't part of hf-compress" in done.stderr


def test_exported_names_are_there_and_others_are_not() -> None:
    for name in ("load", "save", "Layout", "layout_of", "CompressError"):
        assert name in dir(compress)
        assert getattr(compress, name) is not None
    assert issubclass(compress.CompressError, Exception)
    assert CompressError is compress.CompressError
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        _ = compress.lood


def test_tiny_models_are_the_same_each_time() -> None:
    tiny = Tiny("AutoModel", "bert", TINY["bert"].entries)
    assert torch.equal(answer(tiny.build(), tiny.example()), answer(tiny.build(), tiny.example()))
