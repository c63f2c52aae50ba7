"""Options of a plan's `data`, and the checks that need neither torch nor a tokenizer."""

from __future__ import annotations

from pydantic import Field

from compress.contract import Options
from compress.data import sources
from compress.errors import DataError, nearest

SOURCES = ("source", "validation", "test", "other")
COLUMNS = {
    "question-answering": (("question", "context"), "answers"),
    "token-classification": (("tokens",), "tags"),
}


class DataOptions(Options):
    """Where the rows come from and how they are split.

    `source` is "builtin" (prose that ships with Python, and everyday sentences made by a grammar), a .txt, .tokens,
    .jsonl, .json, .csv or .tsv file, a folder saved by `datasets`, or the name of a dataset on the hub, whose `config`
    and `split` may be named. `validation` and `test` are other files, or for a dataset other splits of it; what is not
    given is held out of the source: `held_share` of its rows each, and no more than `validation_rows` and `test_rows`,
    or 2,000; those that are given are cut to so many first rows where that is asked for.
    `other` is a source of another domain with the same columns, for scores beside those of the test: a model that only
    learns the ways of its corpus gains on the one and loses on the other.
    Where texts are written on, a `label` makes them questions with answers: a row each, the answer alone being learnt.
    `substitute` swaps words for random ones of the vocabulary, in each row of calibration and training a share between
    none and so many: for a teacher that is to be heard on more than the data speaks of.
    """

    source: str = Field("builtin", description="builtin, a file, a folder saved by datasets, or a hub name")
    config: str | None = Field(None, description="configuration of a hub dataset")
    split: str = Field("train", description="split of a dataset that rows are taken from")
    text: str | tuple[str, str] | None = Field(None, description="column with the text, or two columns for pairs")
    label: str | None = Field(
        None, description="column with the label: text or integer classes, decimal scores, the answer to write"
    )
    domain: str | None = Field(
        None, description="column that names the corpus each row is from, for `distill`'s mixture"
    )
    labels: tuple[str, ...] | None = Field(None, description="label names in the model's order; default: sorted")
    validation: str | None = Field(None, description="file, or split of the dataset, for validation")
    test: str | None = Field(None, description="file, or split of the dataset, for the final scores")
    other: str | None = Field(None, description="file, folder or hub name of another domain, to score beside the test")
    max_length: int = Field(128, ge=8, description="tokens per row at most")
    train_rows: int | None = Field(None, ge=1, description="rows to train on at most")
    calibration_rows: int = Field(512, ge=1, description="rows for statistics at most")
    validation_rows: int | None = Field(
        None, ge=1, description="rows for validation at most; null: 2000 where they are held out of the source"
    )
    test_rows: int | None = Field(
        None, ge=1, description="rows for the final scores at most; null: 2000 where they are held out of the source"
    )
    held_share: float = Field(0.1, gt=0, le=0.3, description="share of the source held out, for each held-out split")
    substitute: float = Field(
        default=0.0, ge=0, le=1, description="most of a calibration or training row's words swapped for random ones"
    )
    seed: int = Field(0, ge=0, description="seed of the split and of masking")

    def columns(self, task: str) -> tuple[tuple[str, ...], str | None]:
        """The text columns and the label column that `task` reads."""
        texts, label = COLUMNS.get(task, (("text",), None))
        given = (self.text,) if isinstance(self.text, str) else self.text
        return given or texts, self.label or label

    def problems(self, task: str | None = None) -> list[str]:
        """Everything wrong that can be seen without loading: missing or empty files, unknown columns."""
        found = []
        for name in SOURCES:
            if getattr(self, name) is None:
                continue
            source, split = self.location(name)
            try:
                known = sources.peek(source, split)
            except DataError as error:
                found.append(f"data.{name}: {error}")
                continue
            found += [f"data.{name}: {problem}" for problem in self.missing(known, source, task)]
        return found

    def location(self, name: str) -> tuple[str, str]:
        """The source and the split of it that `name`, one of SOURCES, is read from."""
        given = getattr(self, name)
        if name in ("source", "other"):
            return given, self.split
        return (self.source, given) if sources.is_dataset(self.source) else (given, self.split)

    def missing(self, known: tuple[str, ...] | None, source: str, task: str | None) -> list[str]:
        """The columns that are read but not among those `known` (None where they can't be known yet)."""
        if known is None or (task is None and self.text is None):
            return []
        texts, label = self.columns(task or "feature-extraction")
        return [
            f"{source} has no column '{column}'; it has {', '.join(known)}{nearest(column, known)}"
            for column in (*texts, *(one for one in (label, self.domain) if one))
            if column not in known
        ]
