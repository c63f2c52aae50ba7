"""Batches: sequences of like length grouped, padded and masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Sequences = Sequence[Mapping[str, np.ndarray]]
Item = TypeVar("Item")
IGNORED = -100  # the label that transformers' losses leave out
WINDOW = 50  # batches whose rows are sorted together: enough for equal lengths, few enough to stay random


def group(lengths: Sequence[int], size: int, seed: int | None, drop_last: bool) -> list[list[int]]:
    """Return row numbers in batches of `size`: from the longest to the shortest row, or shuffled where seeded.

    Shuffled rows are sorted by length only within windows of 50 batches; the batches are then shuffled in turn.
    """
    if seed is None:
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        batches = cut(order, size)
    else:
        random = np.random.default_rng(seed)
        windows = cut(random.permutation(len(lengths)).tolist(), WINDOW * size)
        ordered = [row for window in windows for row in sorted(window, key=lambda row: -lengths[row])]
        batches = cut(ordered, size)
    if drop_last and batches and len(batches[-1]) < size:
        batches.pop()
    return batches if seed is None else [batches[index] for index in random.permutation(len(batches))]


def cut(items: list[Item], size: int) -> list[list[Item]]:
    """Return pieces of `size` items, the last of which may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def collate(rows: Sequences, pads: Mapping[str, int], max_length: int) -> dict[str, Tensor]:
    """Stack rows on the right padded to a multiple of 8, at most `max_length`: (batch, length); scalars: (batch,)."""
    longest = max(len(row["input_ids"]) for row in rows)
    length = max(longest, min(-(-longest // 8) * 8, max_length))
    batch: dict[str, Tensor] = {}
    for name, first in rows[0].items():
        kind = torch.float32 if first.dtype.kind == "f" else torch.int64
        if first.ndim == 0:
            batch[name] = torch.tensor([row[name].item() for row in rows], dtype=kind)
            continue
        padded = np.full((len(rows), length), pads[name], dtype=np.int64)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row[name])] = row[name]
        batch[name] = torch.from_numpy(padded)
    return batch


def mask_tokens(
    ids: np.ndarray, special: frozenset[int], mask: int, vocabulary: int, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and labels of one sequence for masked language modelling (Devlin et al. 2019).

    Of 15 % of its tokens, at least one, 80 % become the mask, 10 % a random token and 10 % stay. The draw depends
    on the seed and the sequence alone, not on the batch that it comes in.
    """
    random = np.random.default_rng(seed)
    ids, labels = ids.copy(), np.full_like(ids, IGNORED)
    places = np.array([place for place, token in enumerate(ids) if token not in special], dtype=np.int64)
    if len(places) == 0:
        return ids, labels
    chosen = random.choice(places, size=max(1, round(0.15 * len(places))), replace=False)
    labels[chosen] = ids[chosen]
    draw = random.random(len(chosen))
    ids[chosen[draw < 0.8]] = mask
    replaced = chosen[(draw >= 0.8) & (draw < 0.9)]
    ids[replaced] = random.integers(vocabulary, size=len(replaced))
    return ids, labels


def swap_words(ids: np.ndarray, words: np.ndarray, most: float, seed: Sequence[int]) -> np.ndarray:
    """Return the ids of one sequence with some of its `words` swapped for random ones, a share between 0 and `most`.

    A teacher answers any text, so a student can learn what it says of words that the data lacks, and pruning can see
    them; the syntax of the rest stays. TinyBERT (Jiao et al. 2020) swaps by a language model's guesses, here chance
    does: `words` stand in the order of a vocabulary, which begins with the frequent ones, and are drawn by Zipf's law.
    Like the masks, the draw depends on the seed and the sequence alone.
    """
    random = np.random.default_rng(seed)
    swapped = (random.random(len(ids)) < random.uniform(0, most)) & np.isin(ids, words)
    ranks = np.exp(random.random(len(ids)) * np.log(len(words) + 1)) - 1  # its density falls as 1 / (rank + 1)
    return np.where(swapped, words[ranks.astype(np.int64)], ids)
