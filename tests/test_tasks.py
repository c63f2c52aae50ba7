"""Tasks: inferred from a config, loaded from a folder, and refused with a clear word."""

from __future__ import annotations

import pytest
import torch
import transformers

from compress.errors import DataError, LayoutError
from compress.tasks import TASKS, infer_task
from tests.texts import model

ARCHITECTURES = {
    "BertModel": "feature-extraction",
    "BertForSequenceClassification": "text-classification",
    "RobertaForTokenClassification": "token-classification",
    "DistilBertForQuestionAnswering": "question-answering",
    "BertForMaskedLM": "fill-mask",
    "LlamaForCausalLM": "text-generation",
    "GPT2LMHeadModel": "text-generation",
}
KINDS = {"text-generation": "llama"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_task_is_inferred_from_the_architecture(architecture: str) -> None:
    assert infer_task({"architectures": [architecture]}).name == ARCHITECTURES[architecture]


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": ["WhisperForAudioClassification"]}])
def test_unknown_architecture_asks_for_the_task(config: dict[str, object]) -> None:
    with pytest.raises(LayoutError, match="give the task, one of feature-extraction"):
        infer_task(config)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_loads_what_its_class_saved(name: str, tmp_path) -> None:
    task = TASKS[name]
    made = model(task.auto, KINDS.get(name, "bert"))
    made.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = task.load(tmp_path)
    assert type(loaded) is type(made)
    assert infer_task(loaded.config.to_dict()).name == name
    assert loaded.dtype == torch.float32, "compression computes in float32 unless asked otherwise"
    assert all(torch.equal(ours.to(torch.bfloat16), saved) for ours, saved in
               zip(loaded.state_dict().values(), made.state_dict().values(), strict=True))  # fmt: skip


def test_missing_model_names_the_nearest_folder(tmp_path) -> None:
    (tmp_path / "minilm").mkdir()
    with pytest.raises(DataError, match=r"does not exist \(did you mean 'minilm'\?\)"):
        TASKS["fill-mask"].load(tmp_path / "minilmm")


def test_folder_without_config_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        TASKS["fill-mask"].load(tmp_path)


def test_pickled_weights_are_never_read(tmp_path) -> None:
    made = model("AutoModel")
    made.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(DataError, match="can't be loaded"):
        TASKS["feature-extraction"].load(tmp_path)


def test_architecture_without_the_task_is_refused(tmp_path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "d_ff": 8}
    transformers.AutoConfig.for_model("t5", **sizes).save_pretrained(tmp_path)
    with pytest.raises(LayoutError, match="can't be loaded for text-generation: Unrecognized configuration class"):
        TASKS["text-generation"].load(tmp_path)
