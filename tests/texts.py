"""Small tokenizers, rows and models for the tests of data and evaluation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

FIRST = ("the", "a", "cat", "dog", "bird", "red", "blue", "small", "big", "old")
WORDS = (*FIRST, "sees", "likes", "hates", "chases", "house", "tree", "runs", "and", "or", "then")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tokenizer(framed: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, with [CLS] and [SEP] round the text where `framed`."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def sentences(count: int, seed: int = 0, longest: int = 14) -> list[str]:
    """Different random sentences of 3 to `longest` words."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choices(WORDS, k=draw.randint(3, longest)))] = None
    return list(found)


def model(auto: str, kind: str = "bert", **entries: object) -> PreTrainedModel:
    """A tiny random model whose outputs differ well between inputs."""
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": len(SPECIAL) + len(WORDS),
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    made = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **sizes, **entries))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return made.eval()


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    """Write rows as JSON lines and return the path as a plan gives it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
