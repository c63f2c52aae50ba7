"""Answers: the spans that question answering finds, and how they compare with the true ones."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.evaluate import metrics
from compress.evaluate.measures import mean_likeness
from compress.evaluate.run import Batch, Likeness, Measured, Run, likeness

ARTICLE = re.compile(r"\b(a|an|the)\b")
ANSWER_LENGTH = 30  # tokens of an answer at most, as in the SQuAD baselines
NEVER = -1e9  # a logit so low that its token has no share


def measure_answers(run: Run) -> Measured:
    """Exact match and F1 of the best answer over all windows of a question; likeness to the teacher per window.

    Where a question of the split has no answer, the first token stands for "none", as in SQuAD 2.
    """
    encoded = run.data.split(run.split).encoded

    def columns_of(numbers: Sequence[int], batch: Batch, outputs: Any, taught: Any) -> dict[str, Tensor]:
        starts, ends = (side.float().cpu().numpy() for side in (outputs.start_logits, outputs.end_logits))
        spans = [
            (*best_span(start[: len(offsets)], end[: len(offsets)], offsets), float(start[0] + end[0]))
            for start, end, offsets in zip(starts, ends, (encoded.offsets[number] for number in numbers), strict=True)
        ]
        columns = {"span": torch.tensor(spans, dtype=torch.float64)}
        if taught is not None:
            padding = batch["attention_mask"] == 0
            pairs = [
                likeness(
                    outputs[side].masked_fill(padding, NEVER),
                    taught[side].to(padding.device).masked_fill(padding, NEVER),
                )
                for side in ("start_logits", "end_logits")
            ]
            start, end = pairs
            columns["agrees"] = start.agrees * end.agrees
            columns["divergence"] = (start.divergence + end.divergence) / 2
            columns["loyalty"] = (start.loyalty + end.loyalty) / 2
        return columns

    met = run.columns(columns_of)
    answers, truths = find_answers(run, met["span"])
    pairs = list(zip(answers, truths, strict=True))
    columns = {
        "exact": np.array([exact_match(answer, truth) for answer, truth in pairs]),
        "f1": np.array([answer_f1(answer, truth) for answer, truth in pairs]),
    }
    measures = {"f1": metrics.mean("f1"), "exact_match": metrics.mean("exact")}
    if "agrees" in met:
        windows = np.bincount(encoded.owners)
        columns |= {name: np.bincount(encoded.owners, met[name]) / windows for name in Likeness._fields}
    return columns, {**measures, **mean_likeness(columns)}


def find_answers(run: Run, spans: np.ndarray) -> tuple[list[str], list[list[str]]]:
    """Return the answer given to each question, and its true ones, from (score, first, last, none) of each window."""
    part = run.data.split(run.split)
    truths = [list(row.label["text"]) or [""] for row in part.rows]
    may_refuse = [""] in truths
    owners = np.array(part.encoded.owners)
    answers = []
    for number, row in enumerate(part.rows):
        windows = spans[owners == number]
        score, first, last, _ = windows[windows[:, 0].argmax()]
        refused = may_refuse and windows[:, 3].min() > score
        answers.append("" if refused else row.texts[1][int(first) : int(last)])
    return answers, truths


def best_span(start: np.ndarray, end: np.ndarray, offsets: np.ndarray) -> tuple[float, int, int]:
    """Return score, first and last character of the likeliest answer in a window.

    Logits (tokens,) and character offsets (tokens, 2). Tokens whose offsets are -1 are outside the context and
    can't answer; the score is -inf where none can.
    """
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if len(inside) == 0:
        return float("-inf"), 0, 0
    scores = start[inside][:, None] + end[inside][None, :]
    reach = np.arange(len(inside))
    allowed = (reach[None, :] >= reach[:, None]) & (reach[None, :] < reach[:, None] + ANSWER_LENGTH)
    scores = np.where(allowed, scores, -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(offsets[inside[first], 0]), int(offsets[inside[last], 1])


def words(answer: str) -> list[str]:
    """The words of an answer as SQuAD compares them: lower case, without punctuation and articles."""
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return ARTICLE.sub(" ", bare).split()


def exact_match(answer: str, truths: list[str]) -> float:
    """1 where the answer has the words of one of the true ones, else 0."""
    return float(any(words(answer) == words(truth) for truth in truths))


def answer_f1(answer: str, truths: list[str]) -> float:
    """The best F1 of the words in common with one of the true answers (Rajpurkar et al. 2016)."""
    return max(overlap(words(answer), words(truth)) for truth in truths)


def overlap(met: list[str], true: list[str]) -> float:
    """F1 of the words two answers share; 1 where both are empty."""
    if not met or not true:
        return float(met == true)
    shared = sum((collections.Counter(met) & collections.Counter(true)).values())
    return 2 * shared / (len(met) + len(true))
