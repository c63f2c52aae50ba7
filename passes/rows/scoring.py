"""Scoring: how likely a decoder finds each row of a split."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch.nn import functional
from transformers import PreTrainedModel

from compress.data import Split
from compress.data.batches import IGNORED, Sequences, collate, cut, group
from compress.data.rows import read_lines, write_lines
from compress.progress import track

SHARD = 64  # batches a file
PADS = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}


def mean_log_likelihoods(model: PreTrainedModel, split: Split, folder: Path, size: int) -> list[float | None]:
    """The log-likelihood of each row in nats a token, of its answer where it has one; None of what has no such token.

    A text is read by itself, as far as the data reads it, `size` rows at once. Scores are stored in `folder` as they
    come, so that a run that was killed goes on.
    """
    answers = split.rows[0].label is not None
    encoded = split.encoded if answers else split.encoder.encode_texts(split.rows)
    sequences = [row if answers else {**row, "labels": row["input_ids"]} for row in encoded.sequences]
    order = group([len(row["input_ids"]) for row in sequences], size, None, False)
    sums, tokens = [0.0] * len(split.rows), [0] * len(split.rows)
    for index, batches in enumerate(track(shards := cut(order, SHARD), f"scoring by {folder.name}", len(shards))):
        path = folder / f"{index:06}.jsonl"
        if not path.exists():
            parts = ([sequences[row] for row in batch] for batch in batches)
            found = [pair for part in parts for pair in log_likelihoods(model, part, split.encoder.max_length)]
            write_lines([json.dumps(pair) for pair in found], path)
        rows = [row for batch in batches for row in batch]
        for row, (score, count) in zip(rows, read_lines(path), strict=True):
            sums[encoded.owners[row]] += score
            tokens[encoded.owners[row]] += count
    return [score / count if count else None for score, count in zip(sums, tokens, strict=True)]


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, sequences: Sequences, max_length: int) -> list[tuple[float, int]]:
    """The log-likelihood in nats of each sequence's labelled tokens but its very first, and how many they are."""
    batch = send_to_device(collate(sequences, PADS, max_length), model.device)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return list(zip((-losses.sum(1)).tolist(), (labels != IGNORED).sum(1).tolist(), strict=True))
