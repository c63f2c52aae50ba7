"""Data: the four splits of a source, tokenized once when first used, and served as batches."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data import sources
from compress.data.labels import Labels, find_labels
from compress.data.options import SOURCES, DataOptions
from compress.data.rows import read_rows
from compress.data.sources import Query, Row
from compress.data.splits import HELD_ROWS, split_rows
from compress.errors import DataError, nearest
from compress.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from compress.data.encode import Encoded, Encoder

LETTERS = re.compile(r"^\W*[^\W\d_]{2,}$")  # what stands before the letters marks where a word begins or goes on


@dataclass
class Split:
    """Rows of one split, in the order of their source, and the token sequences made of them."""

    rows: list[Row]
    encoder: Encoder

    @cached_property
    def encoded(self) -> Encoded:
        """The rows tokenized, once."""
        return self.encoder.encode(self.rows)


@dataclass
class Data:
    """Four splits without a text in common: calibration, train, validation and test; and `other`, where it is given.

    `fingerprint` is a SHA-256 of content, options, task and tokenizer: what a step computes from equal fingerprints
    is equal. `classes` tells class labels from scores, and is None where there are no labels.
    """

    options: DataOptions
    task: Task
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Split]
    classes: Labels | None
    fingerprint: str
    readings: list[Data] = field(default_factory=list, repr=False, compare=False)  # these rows by every tokenizer
    replaced: dict[str, Data] = field(default_factory=dict, repr=False, compare=False)  # with the rows of a file, each

    @classmethod
    def open(cls, options: DataOptions, tokenizer: PreTrainedTokenizerBase, task: Task) -> Data:
        """Read and split a plan's data; raises DataError where the rows don't fit the task."""
        from compress.data.encode import Encoder

        texts, label = options.columns(task.name)
        check_fit(texts, label, tokenizer, task)
        if options.substitute and label:
            raise DataError(
                f"data.substitute: other words have other labels than those in column '{label}'; "
                "give no label, or leave substitute at 0"
            )
        label = None if task.name == "fill-mask" else label
        found = {}
        for name in SOURCES:
            if getattr(options, name) is not None:
                source, split = options.location(name)
                found[name] = sources.read(source, Query(texts, label, options.domain, options.config, split))
        rows, names = found.pop("source")
        held = {name: held_rows for name, (held_rows, _) in found.items()}
        running = task.packs and sources.is_running(options.source)
        splits = split_rows(rows, held, options, running=running)
        if "other" in held:
            splits["other"] = held["other"][: options.test_rows or HELD_ROWS]
        classes = label_kind(task, label, [*rows, *(row for part in held.values() for row in part)], options, names)
        length = min(options.max_length, tokenizer.model_max_length)
        encoder = Encoder(tokenizer, task.name, length, classes, running)
        return cls(
            options=options,
            task=task,
            tokenizer=tokenizer,
            splits={name: Split(part, encoder) for name, part in splits.items()},
            classes=classes,
            fingerprint=fingerprint(options, tokenizer, task, {"source": rows, **held}),
        )

    def retokenized(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        """These rows as another tokenizer reads them, one object each; itself where the tokens are the same."""
        vocabulary = tokenizer.get_vocab()
        for known in (self, *self.readings):
            if known.tokenizer.get_vocab() == vocabulary:
                return known
        length = min(self.options.max_length, tokenizer.model_max_length)
        splits = {
            name: Split(split.rows, replace(split.encoder, tokenizer=tokenizer, max_length=length))
            for name, split in self.splits.items()
        }
        state = json.dumps([self.fingerprint, tokenizer_state(tokenizer)], sort_keys=True)
        digest = hashlib.sha256(state.encode()).hexdigest()
        if not self.readings:
            self.readings.append(self)
        self.readings.append(replace(self, tokenizer=tokenizer, splits=splits, fingerprint=digest, replaced={}))
        return self.readings[-1]

    def with_rows(self, path: Path) -> Data:
        """Return this data with the rows of a file that `write_rows` wrote for its own, one object for each file."""
        if path.name not in self.replaced:
            rows = {name: Split(found, self.split(name).encoder) for name, found in read_rows(path).items()}
            digest = hashlib.sha256(f"{self.fingerprint} {path.name}".encode()).hexdigest()
            self.replaced[path.name] = replace(
                self, splits={**self.splits, **rows}, fingerprint=digest, readings=[], replaced={}
            )
        return self.replaced[path.name]

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The class names in the order of their numbers; None for scores and where there are no labels."""
        return self.classes.names if self.classes else None

    @property
    def regression(self) -> bool:
        """Whether the labels are scores."""
        return self.classes is not None and self.classes.names is None

    @cached_property
    def words(self) -> np.ndarray:
        """The ids (words,) of the vocabulary's words and parts of words of two letters or more, in its own order."""
        special, tokenizer = set(self.tokenizer.all_special_ids), self.tokenizer
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        return np.array([i for i, token in enumerate(tokens) if i not in special and LETTERS.search(str(token))])

    def scores(self, split: str) -> np.ndarray | None:
        """The score of each row (rows,), where rows are scored."""
        if self.classes is None or self.classes.names is not None:
            return None
        return np.array([self.classes.number(row.label, row.place) for row in self.split(split).rows])

    def split(self, name: str) -> Split:
        """Return a split; DataError with the nearest name where there is none of that name."""
        if name not in self.splits:
            raise DataError(f"no split '{name}'; there are {', '.join(self.splits)}{nearest(name, self.splits)}")
        return self.splits[name]

    def count(self, split: str) -> int:
        """The number of sequences in a split."""
        return len(self.split(split).encoded.sequences)

    def domains(self, split: str) -> dict[str, list[int]]:
        """The numbers of the sequences from each corpus, which a column of the data names."""
        part, found = self.split(split), dict[str, list[int]]()
        for number, owner in enumerate(part.encoded.owners):
            found.setdefault(part.rows[owner].domain, []).append(number)
        return found

    def order(self, split: str, size: int, *, seed: int | None = None, drop_last: bool = False) -> list[list[int]]:
        """Return the sequence numbers of each batch that `batches` yields for the same arguments."""
        from compress.data.batches import group

        lengths = [len(sequence["input_ids"]) for sequence in self.split(split).encoded.sequences]
        return group(lengths, size, seed, drop_last)

    def batches(
        self, split: str, size: int, *, seed: int | None = None, drop_last: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Yield batches of up to `size` sequences of like length, shuffled by `seed` or from longest to shortest.

        Tensors (batch, length): input_ids, attention_mask and what else the tokenizer gives; labels as the task's
        models take them. The masks of fill-mask, and what `substitute` swaps, are drawn anew for each seed.
        """
        for numbers in self.order(split, size, seed=seed, drop_last=drop_last):
            yield self.batch(split, numbers, seed=seed)

    def batch(self, split: str, numbers: Sequence[int], *, seed: int | None = None) -> dict[str, Tensor]:
        """Return the batch of the sequences with these numbers."""
        from compress.data.batches import IGNORED, collate, mask_tokens, swap_words

        tokenizer, part = self.tokenizer, self.split(split)
        sequences = [dict(part.encoded.sequences[number]) for number in numbers]
        most = self.options.substitute if split in ("calibration", "train") else 0.0
        for number, sequence in zip(numbers, sequences, strict=True):
            if most:
                draw = (self.options.seed if seed is None else seed, number)
                sequence["input_ids"] = swap_words(sequence["input_ids"], self.words, most, draw)
            if self.task.name == "fill-mask":
                sequence["input_ids"], sequence["labels"] = mask_tokens(
                    sequence["input_ids"],
                    frozenset(tokenizer.all_special_ids),
                    tokenizer.mask_token_id,
                    len(tokenizer),
                    (self.options.seed if seed is None else seed, number),
                )
            elif self.task.packs:
                sequence.setdefault("labels", sequence["input_ids"])
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        pads = {"input_ids": pad or 0, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
        return collate(sequences, pads, part.encoder.max_length)


def check_fit(texts: tuple[str, ...], label: str | None, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Raise DataError where the columns or the tokenizer can't serve the task."""
    if len(texts) == 2 and task.name == "token-classification":
        raise DataError("data.text: token-classification reads one column of words; met two")
    if task.name == "question-answering" and (len(texts) != 2 or not tokenizer.is_fast):
        raise DataError("data.text: question-answering needs the columns question and context, and a fast tokenizer")
    if task.name == "fill-mask" and tokenizer.mask_token_id is None:
        raise DataError(f"data: {type(tokenizer).__name__} has no mask token, which fill-mask needs")
    if task.name == "feature-extraction" and label and len(texts) != 2:
        raise DataError("data.label: feature-extraction takes scores of pairs only; give two text columns, or no label")


def label_kind(
    task: Task, label: str | None, rows: Sequence[Row], options: DataOptions, names: tuple[str, ...] | None
) -> Labels | None:
    """Tell what the label column holds: nothing, scores for pairs of sentences, or what its values say."""
    if label is None or task.name in ("question-answering", "text-generation"):
        return None
    if task.name == "feature-extraction":
        return Labels(None)
    if task.name == "token-classification":
        tags = [tag for row in rows for tag in (row.label if isinstance(row.label, list) else ())]
        return find_labels(tags, options.labels or names)
    return find_labels((row.label for row in rows), options.labels or names)


def fingerprint(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, task: Task, rows: dict[str, list[Row]]
) -> str:
    """SHA-256 of everything that the batches depend on; where the sources lie is no part of it."""
    digest = hashlib.sha256()
    chosen = options.model_dump(mode="json", exclude=set(SOURCES))
    running = sources.is_running(options.source)
    for part in (chosen, running, task.name, tokenizer_state(tokenizer)):
        digest.update(json.dumps(part, sort_keys=True).encode())
    for name, part_rows in rows.items():
        digest.update(f"{name} {len(part_rows)}".encode())
        for row in part_rows:
            digest.update(json.dumps([row.texts, row.label, row.domain], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What decides a tokenizer's output, less the truncation and padding that a former call has left in it."""
    state: dict[str, object] = {"class": type(tokenizer).__name__, "length": tokenizer.model_max_length}
    state["chat"] = tokenizer.chat_template
    state["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        return state | {part: value for part, value in backend.items() if part not in ("padding", "truncation")}
    return state | {"vocabulary": tokenizer.get_vocab()}
