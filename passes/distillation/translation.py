"""Translation: a batch in the tokens of a teacher with another tokenizer, and where the tokens of both meet.

Text is what both have in common, so a row's tokens are written out and read again by the teacher's tokenizer. Tokens
are told by where they end in the text; the smallest spans that end at the same place in both are chunks, and of them
both models give a likelihood. The token that ends a text becomes the teacher's own and counts as one character of it;
the teacher's special tokens stand before a row in place of the student's. All other special tokens are text as written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.data.batches import IGNORED
from compress.data.encode import end_of, frame
from compress.errors import TrainingError
from passes.distillation.losses.base import Seen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

NOWHERE = -1  # where a token ends that stands for no text, and the chunk of one that is in none
UNFINISHED = "\ufffd"  # what a part of a character is written as
PROBE = "It's 7.5 °C, 'Naïve' said;\n\n  OK?"


@dataclass(frozen=True)
class Marks:
    """Which predictions count, and the number of the chunk that each is of or NOWHERE: both (batch, sequence)."""

    counted: Tensor
    chunks: Tensor

    def on(self, seen: Seen) -> Seen:
        """What a model shows, with these."""
        return replace(seen, counted=self.counted, chunks=self.chunks)


@dataclass(frozen=True)
class Translated:
    """A batch in the teacher's tokens, and the marks of either side."""

    batch: dict[str, Tensor]
    mine: Marks
    theirs: Marks


class Translation:
    """From the tokens of a student to those of a teacher, rows of at most so many; both need fast tokenizers.

    Raises TrainingError where a tokenizer is none, or where the teacher's loses some of what it reads.
    """

    def __init__(self, mine: Any, theirs: Any, most: int | None) -> None:
        if not (mine.is_fast and theirs.is_fast):
            raise TrainingError(
                "distill: a tokenizer is written in Python; expected fast ones, to compare their tokens"
            )
        self.mine, self.theirs, self.most = decoder(mine), decoder(theirs), most
        self.read = partial(theirs, add_special_tokens=False, verbose=False)
        self.prefixes, self.ends = (frame(mine)[0], frame(theirs)[0]), (end_of(mine), end_of(theirs))
        back = self.theirs(self.read(PROBE)["input_ids"])
        if back != PROBE:
            raise TrainingError(
                f"distill: the teacher's tokenizer makes {back!r} of {PROBE!r}; expected one that loses nothing"
            )

    def __call__(self, batch: Mapping[str, Tensor]) -> Translated:
        """A batch (rows, length), padded on the right, in the teacher's tokens."""
        shown = batch["labels"] != IGNORED if "labels" in batch else batch["attention_mask"].bool()
        rows: list[list[int]] = []
        told: list[
            Sequence[Sequence[int]]
        ] = []  # of each row what counts here and there, and the chunks here and there
        first = 0
        for ids, known in zip(batch["input_ids"], shown, strict=True):
            real = int(batch["attention_mask"][len(rows)].sum())
            mine, row, theirs = self.row(ids[:real].tolist())
            told.append(marks(mine, theirs, known[:real].tolist(), first))
            first = max(first, *(chunk + 1 for chunk in told[-1][2]))
            rows.append(row)
        home, here, there = batch["input_ids"].device, batch["input_ids"].shape[1], max(map(len, rows))
        counts, their_counts, chunks, their_chunks = zip(*told, strict=True)
        return Translated(
            {
                "input_ids": stacked(rows, there, 0).to(home),
                "attention_mask": stacked([[1] * len(row) for row in rows], there, 0).to(home),
            },
            Marks(stacked(counts, here, 0).bool().to(home), stacked(chunks, here, NOWHERE).to(home)),
            Marks(stacked(their_counts, there, 0).bool().to(home), stacked(their_chunks, there, NOWHERE).to(home)),
        )

    def row(self, ids: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Where each token of a row ends, the teacher's tokens, and where those end."""
        start = len(self.prefixes[0]) if list(ids[: len(self.prefixes[0])]) == self.prefixes[0] else 0
        mine, row, theirs, base = [NOWHERE] * start, list(self.prefixes[1]), [NOWHERE] * len(self.prefixes[1]), 0
        for ending, part in groupby(ids[start:], key=lambda token: [token] == self.ends[0]):
            tokens = list(part)
            if ending:
                for _ in tokens:
                    base += 1
                    mine.append(base)
                    row += self.ends[1]
                    theirs += [base] * len(self.ends[1])
                continue
            text, ends = written(self.mine, tokens)
            read = self.read(text)["input_ids"]
            back, their_ends = written(self.theirs, read)
            # Beyond a character that one of them changes, no place is the same in both.
            pairs = enumerate(zip(text, back, strict=False))
            agreed = next((place for place, (one, other) in pairs if one != other), min(len(text), len(back)))
            last = max({end for end in ends if end <= agreed} & set(their_ends), default=0)
            mine += [base + end if 0 <= end <= last else NOWHERE for end in ends]
            theirs += [base + end if 0 <= end <= last else NOWHERE for end in their_ends]
            row += read
            base += len(text)
        return mine, row[: self.most], theirs[: self.most]


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """What writes tokens out, special ones among them, and changes nothing to please the eye."""
    backend: Any = tokenizer
    return partial(backend.backend_tokenizer.decode, skip_special_tokens=False)


def written(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of some tokens, and how many characters of it are written with each.

    A token that ends inside a character ends where that does, and NOWHERE if none of the tokens completes it.
    """
    text, before, read = "", 0, 0
    ends: list[int] = []
    for place in range(1, len(ids) + 1):
        # After the tokens before it, as alone some are written without their leading space.
        more = decode(ids[before:place])
        if more.endswith(UNFINISHED):
            continue
        text += more[len(decode(ids[before:read])) :]
        ends += [len(text)] * (place - len(ends))
        before, read = read, place
    return text, ends + [NOWHERE] * (len(ids) - len(ends))


def aligned(mine: Sequence[int], theirs: Sequence[int]) -> tuple[list[int], list[int]]:
    """The number of the chunk that each token is in, by where tokens end: the smallest spans with a common end.

    NOWHERE for tokens after the last common end, and for those that end nowhere.
    """
    common = sorted((set(mine) & set(theirs)) - {NOWHERE})
    found = []
    for ends in (mine, theirs):
        places = [bisect_left(common, end) for end in ends]
        found.append(
            [
                place if end != NOWHERE and place < len(common) else NOWHERE
                for end, place in zip(ends, places, strict=True)
            ]
        )
    return found[0], found[1]


def held(ends: Sequence[int], others: Sequence[int], known: Sequence[bool]) -> list[bool]:
    """For each token whether that of the others that holds its last character is known."""
    real = [place for place, end in enumerate(others) if end != NOWHERE]
    found = [bisect_left(real, end, key=others.__getitem__) for end in ends]
    return [end != NOWHERE and place < len(real) and known[real[place]] for end, place in zip(ends, found, strict=True)]


def marks(
    mine: Sequence[int], theirs: Sequence[int], shown: Sequence[bool], first: int
) -> tuple[list[bool], list[bool], list[int], list[int]]:
    """Of a row what predictions of each side count, and of which chunk each is, counted from `first`.

    A prediction is of the token after it, so that the first token has none. It counts where the student's token is
    `shown`, and where the other side predicts the same place; a chunk counts with all its tokens.
    """
    known = [False, *shown[1:]], [False, *[True] * (len(theirs) - 1)]
    counted = [
        [one and other for one, other in zip(known[0], held(mine, theirs, known[1]), strict=True)],
        [one and other for one, other in zip(known[1], held(theirs, mine, known[0]), strict=True)],
    ]
    chunks = aligned(mine, theirs)
    left_out = {chunk for side in (0, 1) for chunk, one in zip(chunks[side], counted[side], strict=True) if not one}
    numbers = {chunk: first + number for number, chunk in enumerate(sorted(set(chunks[0]) - left_out - {NOWHERE}))}
    found = [[numbers.get(chunk, NOWHERE) for chunk in side[1:]] for side in chunks]
    return counted[0][1:], counted[1][1:], found[0], found[1]


def stacked(rows: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    """Rows padded on the right: (rows, length)."""
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])


def numbered(counted: Any) -> Tensor:
    """The chunks of two models of the same tokens: each token whose prediction counts is one, (batch, sequence)."""
    return (counted.flatten().cumsum(0).view_as(counted) - 1).masked_fill(~counted, NOWHERE)
