"""What leaves is loaded by those it is for: transformers' pipelines, and optimum-intel in an environment of its own.

optimum-intel (2.2) takes transformers below 5.6, so that it can't stand beside this package. HF_COMPRESS_OPTIMUM names
the Python of an environment that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase, pipeline

from compress.families import layout_of
from compress.target import Target
from compress.tasks import TASKS
from exporters import EXPORTERS
from tests.conftest import TINY, Tiny
from tests.world import make_tokenizer

TEXTS = ["the film is fine", "a dull story with its very weak ending"]
OPTIMUM = os.environ.get("HF_COMPRESS_OPTIMUM")
OPENED = """
import json, sys
from optimum.intel import OVModelForFeatureExtraction
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
exact = {"INFERENCE_PRECISION_HINT": "f32"}  # where processors have bfloat16 OpenVINO would rather have that
model = OVModelForFeatureExtraction.from_pretrained(folder, ov_config=exact)
print(json.dumps(model(**inputs).last_hidden_state.tolist()))
"""


class Leaving:
    """As much of a state as an exporter asks for: a tiny model whose blocks differ in width, and a tokenizer."""

    def __init__(self, tiny: Tiny, task: str) -> None:
        self.model = tiny.build(vocab_size=60)
        self.task, self.target, self.tokenizer = TASKS[task], Target(), make_tokenizer()
        layout = layout_of(self.model)
        for name in list(layout.axes)[:2]:
            layout = layout.cut(self.model, name, range(layout.axis(name).least or 1))
        self.layout = layout
        self.dense = type("Dense", (), {"source": None})


def inputs_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "feature-extraction"), ("bert-classifier", "text-classification"), ("llama", "text-generation")],
)
def test_a_pipeline_takes_the_folder_and_computes_what_the_model_does(name: str, task: str, tmp_path: Path) -> None:
    state = Leaving(TINY[name], task)
    EXPORTERS["huggingface"]().run(state, tmp_path / "made")
    run = pipeline(task, model=str(tmp_path / "made"))
    with torch.no_grad():
        inputs = inputs_of(state.tokenizer, TEXTS[:1])
        outputs = state.model(**inputs)
    match task:
        case "feature-extraction":
            np.testing.assert_allclose(run(TEXTS[0])[0], outputs.last_hidden_state[0].numpy(), atol=1e-5)
        case "text-classification":
            best = outputs.logits.softmax(-1)[0].max()
            assert run(TEXTS[0])[0]["score"] == pytest.approx(float(best), abs=1e-5)
        case "text-generation":
            told = run(TEXTS[0], max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
            expected = state.model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert told == expected[0].tolist()


@pytest.mark.skipif(
    OPTIMUM is None, reason="optimum-intel takes transformers below 5.6; HF_COMPRESS_OPTIMUM names none"
)
def test_optimum_intel_takes_the_graph(tmp_path: Path) -> None:
    state = Leaving(TINY["bert"], "feature-extraction")
    EXPORTERS["openvino"]().run(state, tmp_path / "made")
    words = [str(OPTIMUM), "-c", OPENED, str(tmp_path / "made"), json.dumps(TEXTS)]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=alone, capture_output=True, text=True, check=True)
    with torch.no_grad():
        inputs = inputs_of(state.tokenizer, TEXTS)
        expected = state.model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].bool()
    met = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(met[mask], expected[mask], atol=1e-4, rtol=1e-4)
