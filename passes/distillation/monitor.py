"""Monitor: whether a student comes nearer to its teacher by learning the teacher's errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn

RISE = 0.01  # of the loss on labels, over its least, that is more than noise


def label_loss(student: nn.Module, batches: Iterable[Mapping[str, Tensor]], **extras: Any) -> float:
    """A model's own loss on the labels, averaged over the rows of some batches."""
    total, rows = 0.0, 0
    for batch in batches:
        placed = send_to_device(batch, next(student.parameters()).device)
        total += len(batch["input_ids"]) * float(student(**placed, **extras).loss)
        rows += len(batch["input_ids"])
    return total / rows


def hacked(history: Sequence[Mapping[str, float]]) -> list[str]:
    """A sentence where, up to the weights kept, the distance to the teacher fell while the loss on labels rose.

    `history` holds at each `step` the distance as `validation` and the loss on labels as `labels`. That the two part
    is how a student betrays that it exploits its teacher (Tiapkin et al., "On Teacher Hacking in Language Model
    Distillation", arXiv:2502.02671); fresh or more varied data is their remedy.
    """
    if not history or "labels" not in history[-1]:
        return []
    kept = min(range(len(history)), key=lambda at: history[at]["validation"])
    turn = min(history[: kept + 1], key=lambda entry: entry["labels"])
    end = history[kept]
    if end["labels"] <= turn["labels"] * (1 + RISE):
        return []
    fell, rose = ([entry[name] for entry in (turn, end)] for name in ("validation", "labels"))
    return [
        f"from step {turn['step']} to step {end['step']} the distance to the teacher fell from {fell[0]:.4g} to "
        f"{fell[1]:.4g} while the loss on labels rose from {rose[0]:.4g} to {rose[1]:.4g}: the student learns the "
        "teacher's errors; more or more varied data helps, or losses with the task"
    ]
