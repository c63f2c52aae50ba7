"""GGUF files: read back by other programs than wrote them, equal sizes or not, and refusals with their reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from compress.errors import ExportError
from compress.families import layout_of
from compress.target import Target
from compress.tasks import TASKS
from exporters.gguf import Gguf, turned
from tests.conftest import TINY
from tests.world import sentences

WORDS = 320
PLAIN = {"vocab_size": WORDS, "attention_bias": False, "mlp_bias": False}


def bytes_tokenizer() -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=letters)
    inner.train_from_iterator([text for text, _ in sentences(200)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def state(name: str = "llama", cuts: dict | None = None, **entries) -> SimpleNamespace:
    model = TINY[name].build(**{**(PLAIN if name.startswith("llama") else {"vocab_size": WORDS}), **entries})
    layout = layout_of(model)
    for axis, keep in (cuts or {}).items():
        layout = layout.cut(model, f"model.layers.{axis}", keep)
    task, dense = TASKS["text-generation"], SimpleNamespace(source="dense")
    return SimpleNamespace(
        model=model, tokenizer=bytes_tokenizer(), layout=layout, task=task, dense=dense, target=Target()
    )


def test_turning_a_head_is_undone_by_turning_it_back() -> None:
    rows = np.arange(24 * 5).reshape(24, 5)
    found = turned(rows, 6)
    assert found[:6, 0].tolist() == [0, 15, 5, 20, 10, 25]
    assert np.array_equal(turned(found, 6, back=True), rows)


@pytest.mark.parametrize(("name", "head"), [("llama", 6), ("llama-tied", 6), ("qwen2", 4), ("qwen3", 128)])
def test_transformers_reads_the_model_and_its_tokens(name: str, head: int, tmp_path: Path) -> None:
    made = Gguf().run(state(name, head_dim=head), tmp_path / "made")
    assert made.worst_error < 1e-5
    assert made.figures == {"architecture": name.partition("-")[0], "kept_in_f16": [], "read_by": "transformers"}
    assert {file.name for file in (tmp_path / "made").iterdir()} >= {"model.gguf", "config.json", "tokenizer.json"}


@pytest.mark.parametrize(("quantize", "largest"), [("f16", 0.01), ("q8_0", 0.1), ("q4_0", 1.0)])
def test_weights_are_rounded_in_runs_that_fit(quantize: str, largest: float, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    kept = state(**wide, intermediate_size=48)
    made = Gguf(quantize=quantize).run(kept, tmp_path / "made")
    assert made.precision == quantize
    downs = [f"model.layers.{block}.mlp.down_proj.weight" for block in range(3)]
    assert made.figures["kept_in_f16"] == ([] if quantize == "f16" else downs)
    for tensor in gguf.GGUFReader(tmp_path / "made" / "model.gguf").tensors:
        expected = "F32" if tensor.data.ndim == 1 and len(tensor.shape) == 1 else quantize.upper()
        assert tensor.tensor_type.name == ("F16" if "ffn_down" in tensor.name else expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", gguf_file="model.gguf")
    for name, weight in kept.model.state_dict().items():
        assert (loaded.state_dict()[name] - weight).abs().max() <= largest * weight.abs().max()


def test_blocks_of_unlike_sizes_are_told_as_lists(tmp_path: Path) -> None:
    cuts = {"0.heads": [1], "1.heads": [], "1.columns": range(7), "2.heads": [0, 2]}
    made = Gguf().run(state(cuts=cuts), tmp_path / "made")
    assert made.worst_error < 1e-5
    assert made.figures["read_by"] == "gguf"
    reader = gguf.GGUFReader(tmp_path / "made" / "model.gguf")

    def told(field: str) -> object:
        return reader.get_field(field).contents()

    assert told("general.architecture") == "deci"
    assert told("deci.attention.head_count_kv") == [1, 0, 2]
    assert told("deci.attention.head_count") == [2, 0, 4]
    assert told("deci.feed_forward_length") == [29, 7, 29]
    names = {tensor.name for tensor in reader.tensors}
    assert not {f"blk.1.attn_{part}.weight" for part in ("norm", "q", "k", "v", "output")} & names
    assert "blk.1.ffn_down.weight" in names


def test_alike_cuts_stay_in_their_own_architecture(tmp_path: Path) -> None:
    cuts = {f"{block}.{axis}": range(2) for block in range(3) for axis in ("heads", "columns")}
    assert Gguf().run(state(cuts=cuts), tmp_path / "made").figures["read_by"] == "transformers"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "gpt2"}, "met a gpt2; expected one of llama"),
        ({"attention_bias": True}, "has biases"),
        ({"cuts": {"0.columns": []}}, "no feed-forward layer"),
        ({"name": "qwen3", "cuts": {"0.columns": range(5)}}, "blocks of a qwen3 differ in size"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "positions are scaled"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
    ],
)
def test_what_the_format_cannot_tell_is_refused(given: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=said):
        Gguf().run(state(**given), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_model_without_its_tokens_is_refused(tmp_path: Path) -> None:
    kept = state()
    words = models.WordLevel({"<s>": 0, "word": 1}, unk_token="<s>")
    kept.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    with pytest.raises(ExportError, match="the tokenizer is a WordLevel"):
        Gguf().run(kept, tmp_path / "made")
    kept.tokenizer = None
    with pytest.raises(ExportError, match="this model has none"):
        Gguf().run(kept, tmp_path / "made")


def test_a_file_that_tells_otherwise_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.gguf.turned", lambda array, head, back=False: array)
    with pytest.raises(ExportError, match="output 'logits' differs"):
        Gguf().run(state(), tmp_path / "made")
    with pytest.raises(ExportError, match="can't read the file"):
        Gguf().run(state("qwen3"), tmp_path / "made")


def test_a_missing_package_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.gguf.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'hf-compress\[gguf\]'"):
        Gguf().run(state(), tmp_path / "made")


def test_a_model_with_fewer_blocks_is_taken(tmp_path: Path) -> None:
    kept = state(num_hidden_layers=3)
    kept.layout = kept.layout.drop(kept.model, "model.layers", [0, 2])
    made = Gguf().run(kept, tmp_path / "made")
    assert made.figures["read_by"] == "transformers"
    reader = gguf.GGUFReader(tmp_path / "made" / "model.gguf")
    assert reader.get_field("llama.block_count").contents() == 2
