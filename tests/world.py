"""A small world for whole runs: an encoder, its tokenizer, texts and labels, made in a second; and its power cuts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD = ["fine", "bright", "warm", "lively", "clever", "moving"]
BAD = ["dull", "cold", "weak", "clumsy", "hollow", "tired"]
THINGS = ["film", "story", "scene", "actor", "ending", "script", "score", "camera"]
WORDS = ["the", "a", "is", "and", "but", "with", "its", "very", "rather", "this", "was", "not", ".", ","]


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Distinct sentences with a label that their words decide."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        label = draw.randrange(2)
        words = [word for _ in range(draw.randint(1, 5)) for word in (
            draw.choice(WORDS[:2]), draw.choice(THINGS), draw.choice(WORDS[2:6]), draw.choice((BAD, GOOD)[label])
        )]  # fmt: skip
        found[" ".join(words)] = label
    return list(found.items())


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *THINGS, *GOOD, *BAD]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, mask_token="[MASK]", model_max_length=128, **special,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make_world(folder: Path, blocks: int = 2) -> None:
    """Write my-encoder, reviews.txt and reviews.tsv; nearly all the encoder's time goes to feed-forward columns."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "my-encoder")
    make_tokenizer().save_pretrained(folder / "my-encoder")
    rows = sentences(400)
    (folder / "reviews.txt").write_text("\n".join(text for text, _ in rows) + "\n")
    lines = "\n".join(f"{text}\t{label}" for text, label in rows)
    (folder / "reviews.tsv").write_text(f"sentence\tlabel\n{lines}\n")


@contextmanager
def power_cut(owner: type, method: str, call: int) -> Iterator[None]:
    """Inside, a method fails at the call of that number, counted from 0, and with it all that is run here."""
    whole, calls = getattr(owner, method), itertools.count()

    def failing(*given: Any, **more: Any) -> Any:
        if next(calls) == call:
            raise RuntimeError("power cut")
        return whole(*given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, failing)
        with pytest.raises(RuntimeError, match="power cut"):
            yield
