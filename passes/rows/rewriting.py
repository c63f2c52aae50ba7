"""Rewriting: a model answers questions, batch by batch on disk; and whether two answers come to one result."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.data.batches import group
from compress.data.encode import ask
from compress.data.labels import as_number
from compress.data.rows import read_lines, write_lines
from compress.progress import track
from compress.runtimes.examples import longest_sequence
from compress.writing import ends_of, write_on

NO_END, NO_ROOM = "no end", "no room"


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    folder: Path,
    *,
    tokens: int,
    temperature: float,
    size: int,
    seed: int,
) -> list[tuple[str, str]]:
    """The answer to each question, and what keeps it from being whole: it came to no end, or had no room.

    `size` questions of like length are answered at once. Each batch is stored in `folder` when it is written, so that
    a run that was killed goes on with the next one and ends with the same answers.
    """
    asked = ask(tokenizer, questions)
    room, ends = (longest_sequence(model) or 2**31) - tokens, ends_of(model, tokenizer)
    fitting = [number for number, ids in enumerate(asked) if len(ids) <= room]
    batches = group([len(asked[number]) for number in fitting], size, None, False)
    answers = [("", NO_ROOM)] * len(asked)
    for index, batch in enumerate(track(batches, f"writing {folder.name}", len(batches))):
        shard, numbers = folder / f"{index:06}.jsonl", [fitting[place] for place in batch]
        if not shard.exists():
            with torch.random.fork_rng():
                torch.manual_seed(seed + index)
                prompts = [asked[number] for number in numbers]
                written = write_on(model, prompts, most=tokens, ends=ends, temperature=temperature)
            whole = ["" if ids and ids[-1] in ends else NO_END for ids in written]
            texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]
            write_lines([json.dumps(pair) for pair in zip(texts, whole, strict=True)], shard)
        for number, (text, lack) in zip(numbers, read_lines(shard), strict=True):
            answers[number] = text, lack
    return answers


def result_of(answer: str, pattern: str) -> str | None:
    """The last match of a pattern in an answer, of it the first group where there is one; None where none matches."""
    found = [match.group(1) if match.re.groups else match.group() for match in re.finditer(pattern, answer)]
    return found[-1] if found else None


def agree(one: str, other: str, pattern: str) -> bool:
    """Whether two answers come to one result: equal numbers however written, or equal words in any case."""
    results = [result_of(answer, pattern) for answer in (one, other)]
    numbers = [as_number(None if result is None else result.replace(",", "")) for result in results]
    if None not in numbers:
        return numbers[0] == numbers[1]
    first, second = (None if result is None else result.casefold().split() for result in results)
    return first == second
