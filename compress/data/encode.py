"""Encoding: rows of text turned into the token sequences that a task's models take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from compress.data.batches import IGNORED
from compress.data.labels import Labels
from compress.data.sources import Row
from compress.errors import DataError
from compress.progress import say, track

CHUNK = 1000  # rows tokenized by one call
Tokens = dict[str, np.ndarray]  # of one sequence


@dataclass
class Encoded:
    """Token sequences; `owners` tells the row that each stems from.

    `offsets` (question answering only) holds for each sequence where its tokens stand in the context: an array
    (tokens, 2) of characters, -1 for tokens that aren't of the context.
    """

    sequences: list[Tokens] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    offsets: list[np.ndarray] = field(default_factory=list)

    def add(self, owner: int, encoding: Mapping[str, Any], index: int, **labels: Any) -> None:
        """Append sequence `index` of a tokenizer's output."""
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoding]
        sequence = {name: np.asarray(encoding[name][index], dtype=np.int32) for name in names}
        sequence.setdefault("attention_mask", np.ones_like(sequence["input_ids"]))
        self.sequences.append(sequence | {name: np.asarray(value) for name, value in labels.items()})
        self.owners.append(owner)


@dataclass(frozen=True)
class Encoder:
    """Turns rows into sequences of at most `max_length` tokens.

    `running` says that neighbouring rows are parts of one text.
    """

    tokenizer: PreTrainedTokenizerBase
    task: str
    max_length: int
    labels: Labels | None
    running: bool

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Encode all rows as the task asks."""
        if self.task == "text-generation" and rows and rows[0].label is not None:
            return self.encode_answers(rows)
        methods = {
            "feature-extraction": self.encode_texts,
            "text-classification": self.encode_classes,
            "token-classification": self.encode_words,
            "question-answering": self.encode_questions,
        }
        return methods.get(self.task, self.pack)(rows)

    def encode_texts(self, rows: Sequence[Row]) -> Encoded:
        """Encode each text by itself: the two sides of pair i become sequences 2i and 2i + 1."""
        encoded = Encoded()
        for start, part in chunks(rows):
            texts = [(start + number, text) for number, row in enumerate(part) for text in row.texts]
            encoding = self.tokenize([text for _, text in texts])
            for index, (owner, _) in enumerate(texts):
                encoded.add(owner, encoding, index)
        return encoded

    def encode_classes(self, rows: Sequence[Row]) -> Encoded:
        """Encode each row, pairs as one sequence, with its class or score where there are labels."""
        encoded = Encoded()
        for start, part in chunks(rows):
            sides = zip(*(row.texts for row in part), strict=True)
            encoding = self.tokenize(*(list(side) for side in sides))
            for index, row in enumerate(part):
                given = {"labels": self.labels.number(row.label, row.place)} if self.labels else {}
                encoded.add(start + index, encoding, index, **given)
        return encoded

    def encode_words(self, rows: Sequence[Row]) -> Encoded:
        """Encode lists of words; the first token of each word carries its tag, the others none."""
        encoded = Encoded()
        for start, part in chunks(rows):
            encoding = self.tokenize([list(row.texts[0]) for row in part], is_split_into_words=True)
            for index, row in enumerate(part):
                if not isinstance(row.label, list) or len(row.label) != len(row.texts[0]):
                    met = len(row.label) if isinstance(row.label, list) else type(row.label).__name__
                    raise DataError(f"{row.place}: met {met} tags; expected {len(row.texts[0])}, one for each token")
                tags = [self.labels.number(tag, row.place) for tag in row.label] if self.labels else []
                words = encoding.word_ids(index)
                pairs = zip(words, [None, *words[:-1]], strict=True)
                labels = [IGNORED if word in (None, former) else tags[word] for word, former in pairs]
                encoded.add(start + index, encoding, index, labels=labels)
        return encoded

    def encode_questions(self, rows: Sequence[Row]) -> Encoded:
        """Encode question and context in overlapping windows, with the first and last token of the answer.

        A window that doesn't hold the whole answer points at its first token, as Devlin et al. (2019) do.
        """
        encoded = Encoded()
        for start, part in chunks(rows):
            questions, contexts = ([row.texts[side] for row in part] for side in (0, 1))
            encoding = self.tokenizer(
                questions,
                contexts,
                truncation="only_second",
                max_length=self.max_length,
                stride=self.max_length // 4,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for index, owner in enumerate(encoding["overflow_to_sample_mapping"]):
                of_context = np.array([side == 1 for side in encoding.sequence_ids(index)])
                offsets = np.where(of_context[:, None], np.array(encoding["offset_mapping"][index]), -1)
                first, last = find_answer(part[owner], offsets)
                encoded.add(start + owner, encoding, index, start_positions=first, end_positions=last)
                encoded.offsets.append(offsets)
        return encoded

    def encode_answers(self, rows: Sequence[Row]) -> Encoded:
        """Encode each question with its answer, whose tokens alone, the end of text among them, have labels.

        What is too long loses the end of its answer; where there is room for none of it, the row is left out and told.
        """
        encoded = Encoded()
        for start, part in chunks(rows):
            asked = ask(self.tokenizer, ["\n\n".join(row.texts) for row in part])
            texts = [written_answer(row) for row in part]
            answers = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for index, (before, after) in enumerate(zip(asked, answers, strict=True)):
                ids = [*before, *after, *end_of(self.tokenizer)][: self.max_length]
                labels = [*[IGNORED] * len(before), *ids[len(before) :]]
                if len(ids) > len(before):
                    encoded.add(start + index, {"input_ids": [ids]}, 0, labels=labels)
        if left := len(rows) - len(encoded.sequences):
            met = f"data.max_length: {self.max_length} leaves no room for the answer in {left} of {len(rows)} rows"
            if not encoded.sequences:
                raise DataError(f"{met}; expected more tokens")
            say(f"{met}, which are left out")
        return encoded

    def pack(self, rows: Sequence[Row]) -> Encoded:
        """Join the tokens of all rows of a corpus and cut them to full length; only its last sequence may be shorter.

        A sequence's owner is the first row of its corpus.
        """
        prefix, suffix = frame(self.tokenizer)
        body = self.max_length - len(prefix) - len(suffix)
        encoded = Encoded()
        corpora: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            corpora.setdefault(row.domain, []).append(number)
        for numbers in corpora.values():
            tokens: list[int] = []
            for tail in (*self.token_lists([rows[number] for number in numbers]), None):
                tokens += tail or []
                while len(tokens) >= body or (tail is None and len(tokens) > 1):
                    ids = [*prefix, *tokens[:body], *suffix]
                    encoded.add(numbers[0], {"input_ids": [ids]}, 0)
                    del tokens[:body]
        return encoded

    def token_lists(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Yield the tokens of the texts: running text whole, documents each followed by the end-of-text token."""
        for _, part in chunks(rows):
            texts = ["\n\n".join(row.texts) for row in part]
            if self.running:
                texts = ["\n\n".join(texts) + "\n\n"]
            for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                yield ids if self.running else [*ids, *end_of(self.tokenizer)]

    def tokenize(self, *texts: list[Any], **options: Any) -> Any:
        """Call the tokenizer, cutting what is too long."""
        return self.tokenizer(*texts, truncation=True, max_length=self.max_length, **options)


def chunks(rows: Sequence[Row]) -> Iterator[tuple[int, Sequence[Row]]]:
    """Yield the number of the first row and the rows of each chunk."""
    for start in track(range(0, len(rows), CHUNK), "tokenizing"):
        yield start, rows[start : start + CHUNK]


def end_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a text; none where the tokenizer has no such token."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return [] if end is None else [end]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer sets before and after a text."""
    word = tokenizer.convert_ids_to_tokens([len(tokenizer) // 2])[0]
    bare = tokenizer(word, add_special_tokens=False)["input_ids"]
    full = tokenizer(word)["input_ids"]
    start = next(place for place in range(len(full) + 1) if full[place : place + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def ask(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    """The tokens of each question up to where its answer begins: by the chat template where the tokenizer has one."""
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": question}] for question in questions]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        prefix: list[int] = []
    else:
        texts, (prefix, _) = [f"{question}\n\n" for question in questions], frame(tokenizer)
    encoding = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [[*prefix, *ids] for ids in encoding["input_ids"]]


def written_answer(row: Row) -> str:
    """A row's answer; DataError where it is no text."""
    if not isinstance(row.label, str) or not row.label.strip():
        raise DataError(f"{row.place}: the answer is {row.label!r}; expected text")
    return row.label


def find_answer(row: Row, offsets: np.ndarray) -> tuple[int, int]:
    """Return the first and last token of a row's first answer, (0, 0) where the window doesn't hold it."""
    answer = first_answer(row)
    if answer is None:
        return 0, 0
    start, end = answer
    inside = np.flatnonzero((offsets[:, 0] >= 0) & (offsets[:, 0] < end) & (offsets[:, 1] > start))
    if len(inside) == 0 or offsets[inside[0], 0] > start or offsets[inside[-1], 1] < end:
        return 0, 0
    return int(inside[0]), int(inside[-1])


def first_answer(row: Row) -> tuple[int, int] | None:
    """Return the characters of a row's first answer in its context; DataError where they don't spell it."""
    answers = row.label
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= set(answers):
        raise DataError(f"{row.place}: the answers are {answers!r}; expected {{text: [...], answer_start: [...]}}")
    if not answers["text"]:
        return None
    text, start = answers["text"][0], answers["answer_start"][0]
    met = row.texts[1][start : start + len(text)]
    if met != text:
        raise DataError(f"{row.place}: answer_start {start} is at {met!r} in the context; expected {text!r}")
    return start, start + len(text)
