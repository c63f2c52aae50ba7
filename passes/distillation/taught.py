"""What a teacher said of every text, on disk: written shard by shard, read row by row.

A shard is a safetensors file of some neighbouring rows of a split. In it the real tokens of its rows stand one after
another, without padding, and `lengths` (rows,) counts them. Of the tokens drawn from a prediction equal ones are one
entry, whose weight says how many they were; entries follow one another too, and `counts` (tokens,) says how many a
token has. So what is stored grows with how unsure a teacher is, and a row is found by two sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.data import Data
from compress.errors import TrainingError
from passes.distillation.losses.base import Seen
from passes.distillation.losses.predictions import Draws

SPLITS = ("train", "validation")  # what a recovery looks at
SHARD_TOKENS = 2**16  # another number, or another file, is another version of Teach
OPEN_SHARDS = 64
MARK = "teacher."  # how those names of a batch begin that are the teacher's
ENTRIES = ("ids", "weights", "logs")
SCORES = "scores"  # predictions of a whole row
PREDICTIONS = "predictions"  # those of its tokens


def draw(logits: Tensor, starts: Tensor, samples: int, temperature: float = 1.0, proposal: float = 1.0) -> Draws:
    """Tokens drawn from ``p = softmax(logits / temperature)`` (rows, classes), so many from each row.

    They are drawn from r, proportional to ``p^(1 / proposal)``, and weighed by p / r: on average over the draws, each
    class has its probability. A row's draws stand at equal steps along the cumulated probabilities, from where `starts`
    (rows,) says, between 0 and 1: on average the same as draws apart from one another, but a class of probability 0.25
    is a quarter of them each time and not about a quarter. Random sampling of logits: Anshumann et al.,
    arXiv:2503.16870.
    """
    logs = logits.double().div(temperature).log_softmax(-1)
    offered = logs if proposal == 1 else logs.div(proposal).log_softmax(-1)
    cumulated = offered.exp().cumsum(-1)
    steps = torch.arange(samples, dtype=torch.float64, device=logits.device)
    places = (steps + starts[:, None].to(steps)) / samples * cumulated[:, -1:]
    ids = torch.searchsorted(cumulated, places, right=True).clamp(max=logits.shape[-1] - 1)
    chosen = logs.gather(-1, ids)
    return Draws(ids, (chosen - offered.gather(-1, ids)).exp() / samples, chosen, temperature)


def entries(draws: Draws, classes: int) -> dict[str, Tensor]:
    """Draws (tokens, samples) with the equal tokens of a row, which stand together, made one."""
    first = torch.ones_like(draws.ids, dtype=torch.bool)
    first[:, 1:] = draws.ids[:, 1:] != draws.ids[:, :-1]
    places = first.flatten().cumsum(0) - 1
    weights = draws.weights.new_zeros(int(first.sum())).index_add_(0, places, draws.weights.flatten())
    return {
        "counts": first.sum(1).to(torch.int16),
        "ids": draws.ids[first].to(torch.uint16 if classes <= 2**16 else torch.int32),
        "weights": weights.half(),
        "logs": draws.logs[first].half(),
    }


def lengths_of(data: Data, split: str) -> list[int]:
    """The tokens of each row."""
    return [len(sequence["input_ids"]) for sequence in data.split(split).encoded.sequences]


def shards(folder: Path, split: str, lengths: Sequence[int]) -> dict[Path, range]:
    """Where each shard lies and its rows: neighbours, of about `SHARD_TOKENS` together."""
    found: dict[Path, range] = {}
    start = held = 0
    for row, length in enumerate(lengths):
        held += length
        if held >= SHARD_TOKENS or row == len(lengths) - 1:
            found[folder / f"{split}-{len(found):05d}.safetensors"] = range(start, row + 1)
            start, held = row + 1, 0
    return found


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file({name: one.contiguous() for name, one in tensors.items()}, unfinished)
    os.replace(unfinished, path)


class Shard:
    """One shard, opened: where each of its rows begins among the tokens and among the entries."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, framework="pt")
        self.names = set(self.file.keys())
        self.tokens = sums(self.file.get_tensor("lengths"))
        self.entries = sums(self.file.get_tensor("counts"))[self.tokens] if "counts" in self.names else None

    def row(self, name: str, place: int) -> Tensor:
        """What is stored under a name, in int64 or float32, of a row by its place: of its tokens, entries or itself."""
        ends = self.entries if name in ENTRIES else self.tokens
        part = slice(place, place + 1) if name == SCORES or ends is None else slice(*ends[place : place + 2].tolist())
        found = self.file.get_slice(name)[part]
        return found.float() if found.is_floating_point() else found.long()


class Taught:
    """The stored outputs of a teacher, as facts tell of them, for batches of texts that it has not to see again.

    Raises TrainingError where two steps have stored them, where they are of other texts than `data` has, or no more
    there.
    """

    def __init__(self, facts: Sequence[Mapping[str, Any]], run: Path, data: Data) -> None:
        fact, *others = facts
        if any(other != fact for other in others):
            raise TrainingError("distill: two steps stored predictions and states; expected one teach that stores both")
        self.fact, self.data, folder = fact, data, run / fact["folder"]
        if fact["data"] != data.fingerprint or not folder.exists():
            raise TrainingError(
                f"distill: what the teacher said, in {folder}, is of other texts or gone; expected teach in this run, "
                "after every step that changes texts or tokens"
            )
        self.opened = lru_cache(maxsize=OPEN_SHARDS)(Shard)
        self.homes = {  # of each row the shard and its place in there
            split: [
                (path, place)
                for path, rows in shards(folder, split, lengths_of(data, split)).items()
                for place in range(len(rows))
            ]
            for split in SPLITS
        }

    def batches(self, split: str, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """The batches of `Data.batches`, each with what the teacher said of it."""
        for numbers in self.data.order(split, size, seed=seed):
            batch = self.data.batch(split, numbers, seed=seed)
            homes = [self.homes[split][number] for number in numbers]
            yield {**batch, **self.said(homes, batch["attention_mask"].bool())}

    def said(self, homes: Sequence[tuple[Path, int]], mask: Tensor) -> dict[str, Tensor]:
        """The teacher's tensors of some rows, (batch, sequence, ...) and zero at padding; scores (batch, classes)."""
        rows = [(self.opened(path), place) for path, place in homes]
        stored = {name: torch.cat([shard.row(name, place) for shard, place in rows]) for name in rows[0][0].names}
        found = {name: spread(stored[name], mask) for name in stored.keys() - {"lengths", SCORES, *ENTRIES}}
        if "counts" in found:
            counts = found.pop("counts")
            drawn = torch.arange(int(counts.max())) < counts[..., None]
            found |= {name: spread(stored[name], drawn) for name in ENTRIES}
        found |= {name: stored[name] for name in stored.keys() & {SCORES}}
        return {MARK + name: one for name, one in found.items()}

    def seen(self, batch: Mapping[str, Tensor]) -> Seen:
        """What the teacher showed on a batch of `batches`; None stands for states that are not stored."""
        said = {name.removeprefix(MARK): one for name, one in batch.items() if name.startswith(MARK)}
        states: Any = [said.get(f"states.{block}") for block in range(self.fact["blocks"])]
        predictions: Any = said.get(SCORES, said.get(PREDICTIONS))
        if "ids" in said:
            predictions = Draws(said["ids"], said["weights"], said["logs"], self.fact["temperature"])
        return Seen(batch["attention_mask"].bool(), states, predictions)


def sums(lengths: Tensor) -> Tensor:
    """Where pieces of these lengths begin, one after another, and where the last ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def spread(values: Tensor, where: Tensor) -> Tensor:
    """Values put in their order where `where` is true, zeros elsewhere."""
    found = values.new_zeros(*where.shape, *values.shape[1:])
    found[where] = values
    return found
