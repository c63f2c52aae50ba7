"""Tiny random models, one a family and shape of block, with inputs to run them: what every test file builds upon."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, and waiting ones spin

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.card import card, emulated, lanes  # noqa: F401  # fixtures

ENCODER = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 29,
    "vocab_size": 53,
    "max_position_embeddings": 40,
}
DECODER = {**ENCODER, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SEQ2SEQ = {**ENDS, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Tiny:
    """A tiny model as data: its auto class, type and config entries; `inputs` names the kind of example it takes."""

    auto: str
    kind: str
    entries: dict[str, Any] = field(default_factory=dict)
    inputs: str = "text"
    attentions: tuple[str, ...] = ("sdpa", "eager")

    @property
    def generates(self) -> bool:
        """Whether the model writes text."""
        return "Causal" in self.auto or "Seq2Seq" in self.auto

    def build(self, attention: str | None = None, **entries: Any) -> PreTrainedModel:
        """The model in evaluation mode, the same weights for the same entries; biases are random as well."""
        config = transformers.AutoConfig.for_model(self.kind, **{**self.entries, **entries})
        torch.manual_seed(0)
        model = getattr(transformers, self.auto).from_config(
            config, attn_implementation=attention or self.attentions[0]
        )
        with torch.no_grad():  # fresh models have zero biases and faint weights, which would hide mistakes
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6.0)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.5)
        return model.eval()

    def example(self, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
        """Inputs for one call; the last row of text is padded."""
        return INPUTS[self.inputs](batch, length)


def text(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - 3 :] = 0
    ids = torch.randint(3, 50, (batch, length), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def both_texts(batch: int, length: int) -> dict[str, Tensor]:
    return {**text(batch, length), "decoder_input_ids": text(batch, length - 2)["input_ids"]}


def image(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def sound(batch: int, length: int) -> dict[str, Tensor]:
    features = torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": text(batch, length)["input_ids"]}


INPUTS: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    "text": text,
    "both texts": both_texts,
    "image": image,
    "sound": sound,
}

T5 = {
    "d_model": 24,
    "d_kv": 7,
    "num_heads": 3,
    "d_ff": 29,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "vocab_size": 53,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    **SEQ2SEQ,
}
WHISPER = {
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 29,
    "decoder_ffn_dim": 31,
    "num_mel_bins": 5,
    "max_source_positions": 8,
    "max_target_positions": 40,
    "vocab_size": 53,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    **SEQ2SEQ,
}
ROBERTA = {**ENCODER, "pad_token_id": 0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
TINY = {
    "bert": Tiny("AutoModel", "bert", ENCODER),
    "bert-classifier": Tiny("AutoModelForSequenceClassification", "bert", ENCODER),
    "bert-decoder": Tiny("AutoModelForCausalLM", "bert", {**ENCODER, "is_decoder": True, **ENDS}),
    "roberta": Tiny("AutoModelForMaskedLM", "roberta", ROBERTA),
    "xlm-roberta": Tiny("AutoModelForTokenClassification", "xlm-roberta", ROBERTA),
    "camembert": Tiny("AutoModel", "camembert", ROBERTA),
    "electra": Tiny("AutoModelForSequenceClassification", "electra", {**ENCODER, "embedding_size": 17}),
    "distilbert": Tiny(
        "AutoModelForSequenceClassification",
        "distilbert",
        {"dim": 24, "n_heads": 3, "n_layers": 3, "hidden_dim": 29, "vocab_size": 53, "max_position_embeddings": 40},
    ),
    "mpnet": Tiny("AutoModelForMaskedLM", "mpnet", {**ENCODER, "pad_token_id": 1}, attentions=("eager",)),
    "llama": Tiny("AutoModelForCausalLM", "llama", {**DECODER, **ENDS, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": Tiny("AutoModelForCausalLM", "llama", {**DECODER, **ENDS, "tie_word_embeddings": True}),
    "mistral": Tiny("AutoModelForCausalLM", "mistral", {**DECODER, **ENDS, "sliding_window": 5}),
    "qwen2": Tiny("AutoModelForCausalLM", "qwen2", {**DECODER, **ENDS}),
    "qwen3": Tiny("AutoModelForCausalLM", "qwen3", {**DECODER, **ENDS, "tie_word_embeddings": True}),
    "gemma3": Tiny("AutoModelForCausalLM", "gemma3_text", {**DECODER, **ENDS, **SLIDING, "query_pre_attn_scalar": 6}),
    "gpt2": Tiny(
        "AutoModelForCausalLM",
        "gpt2",
        {"n_embd": 24, "n_head": 3, "n_layer": 3, "vocab_size": 53, "n_positions": 40, **ENDS},
    ),
    "gpt_neox": Tiny("AutoModelForCausalLM", "gpt_neox", {**ENCODER, **ENDS}),
    "opt": Tiny(
        "AutoModelForCausalLM",
        "opt",
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_hidden_layers": 3,
            "ffn_dim": 29,
            "word_embed_proj_dim": 24,
            "vocab_size": 53,
            "max_position_embeddings": 40,
            **ENDS,
        },
    ),
    "vit": Tiny(
        "AutoModelForImageClassification",
        "vit",
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_hidden_layers": 3,
            "intermediate_size": 29,
            "image_size": 8,
            "patch_size": 4,
        },
        "image",
    ),
    "whisper": Tiny("AutoModelForSpeechSeq2Seq", "whisper", WHISPER, "sound"),
    "t5": Tiny("AutoModelForSeq2SeqLM", "t5", T5, "both texts"),
    "t5-gated": Tiny("AutoModelForSeq2SeqLM", "t5", {**T5, "feed_forward_proj": "gated-gelu"}, "both texts"),
}
GENERATING = tuple(name for name, tiny in TINY.items() if tiny.generates)


def answer(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The main output of a model, at the places that are no padding, as one flat vector."""
    with torch.no_grad():
        outputs = model(**inputs)
    first = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is not None and first.ndim == 3 and first.shape[:2] == mask.shape:
        first = first[mask.bool()]
    return first.flatten()


def precise(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The answer of a copy in float64, in which models that must compute the same are compared.

    Large weights and unscaled attention make of a rounding error in float32 anything, and how a machine rounds depends
    on shapes.
    """
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return answer(copy.deepcopy(model).double(), doubles)


def assert_one_model(one: PreTrainedModel, other: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """That two models, most often a saved and a loaded one, have equal weights, bit for bit, and compute the same.

    In float32 what they compute may differ by a bit: loaded weights lie wherever the file was mapped, and the kernels
    of some machines choose by how memory is aligned.
    """
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, others[name])] == []
    torch.testing.assert_close(precise(one, inputs), precise(other, inputs), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module", autouse=True)
def quick_to_release() -> None:
    """Spare collections of garbage, one for each branch of a state, a look through all that was imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return TINY[request.param]
