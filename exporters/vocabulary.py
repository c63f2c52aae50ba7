"""A tokenizer as GGUF tells it: the tokens in order, what each is, and the merges or the scores that make them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compress.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCES = ("The quick brown fox, 42 years old, jumps!", "  two  spaces\nand a line", "naïve café – 東京 🙂")


def write_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int, pre: str) -> None:
    """Tell a GGUF writer of a tokenizer, filled up to as many tokens as the table has rows.

    Raises ExportError where it is neither a byte-level BPE, as GPT-2's, nor one from SentencePiece, as Llama's.
    """
    from gguf import TokenType

    inner: Any = getattr(tokenizer, "backend_tokenizer", None)
    told = json.loads(inner.to_str()) if inner is not None else {"model": {}}
    model, before = told["model"], json.dumps(told.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not ('"ByteLevel"' in before or model.get("byte_fallback")):
        kind = model.get("type") or type(tokenizer).__name__
        raise ExportError(f"gguf: the tokenizer is a {kind}; expected a BPE of bytes, or one from SentencePiece")
    plain = model["vocab"].keys()
    tokens = [inner.id_to_token(number) or f"[unused{number}]" for number in range(rows)]
    unknown, special = tokenizer.unk_token_id, set(tokenizer.all_special_ids)
    kinds = []
    for number, token in enumerate(tokens):
        if number >= len(tokenizer):
            kinds.append(TokenType.UNUSED)
        elif number in special:
            kinds.append(TokenType.UNKNOWN if number == unknown and token in plain else TokenType.CONTROL)
        elif model.get("byte_fallback") and token.startswith("<0x") and token.endswith(">"):
            kinds.append(TokenType.BYTE)
        else:
            kinds.append(TokenType.NORMAL if token in plain else TokenType.USER_DEFINED)
    if '"ByteLevel"' in before:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(number) for number in range(rows)])  # pieces stand in the order of their merges
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    first = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(first)


def differing(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """The sentences that two tokenizers split differently, of a few that are hard."""

    def split(one: PreTrainedTokenizerBase, text: str) -> list[int]:
        return one(text, add_special_tokens=False)["input_ids"]

    return [text for text in SENTENCES if split(tokenizer, text) != split(other, text)]
