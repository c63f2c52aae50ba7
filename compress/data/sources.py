"""Sources: rows read from the corpus, files or datasets, with errors that name file and line."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.data.corpus import read_corpus
from compress.data.everyday import everyday
from compress.errors import DataError, nearest
from compress.progress import say
from compress.tasks import HUB_NAME, first_line

RUNNING = (".txt", ".tokens")
FORMATS = (*RUNNING, ".jsonl", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Row:
    """One row: the values of its text columns, its label as read, where it stands (`file:line`), and its corpus."""

    texts: tuple[Any, ...]
    label: Any = None
    place: str = field(default="", compare=False)
    domain: str = ""


@dataclass(frozen=True)
class Query:
    """Which columns are read, and of which configuration and split where the source is a dataset."""

    texts: tuple[str, ...]
    label: str | None = None
    domain: str | None = None
    config: str | None = None
    split: str = "train"


def is_running(source: str) -> bool:
    """Whether neighbouring rows are parts of one text, which is then split in ranges."""
    return Path(source).suffix in RUNNING


def is_dataset(source: str) -> bool:
    """Whether `source` is a folder saved by `datasets` or a name on the hub; anything else is a file."""
    path = Path(source).expanduser()
    if path.exists() or source == "builtin":
        return path.is_dir()
    named = HUB_NAME.fullmatch(source) and not source.startswith(".") and path.suffix not in FORMATS
    return bool(named) and (not path.parent.is_dir() if "/" in source else not path.suffix)


def peek(source: str, split: str) -> tuple[str, ...] | None:
    """Return the columns of a source without loading it, None for a name on the hub; DataError where it's unfit."""
    path = Path(source).expanduser()
    if source == "builtin":
        return ("text",)
    if path.is_dir():
        return dataset_columns(path, split)
    if is_dataset(source):
        return None
    check_file(path)
    if path.suffix in RUNNING:
        return ("text",)
    if path.suffix == ".json" and path.stat().st_size > 50_000_000:
        return None  # all of it would have to be parsed to see one row
    return tuple(next(read_records(path))[1])


def check_file(path: Path) -> None:
    """Raise DataError unless `path` is a readable file of a known format with something in it."""
    if not path.exists():
        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist{nearest(path.name, near)}")
    if path.suffix not in FORMATS:
        raise DataError(f"{path} has the ending '{path.suffix}'; expected one of {', '.join(FORMATS)}")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise DataError(f"{path} can't be read")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")


def dataset_columns(folder: Path, split: str) -> tuple[str, ...]:
    """Return the columns of a folder saved by `datasets`, whether one dataset or a dictionary of splits."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            if split not in splits:
                raise DataError(f"{folder} has no split '{split}'; it has {', '.join(splits)}{nearest(split, splits)}")
            folder = folder / split
        return tuple(json.loads((folder / "dataset_info.json").read_text())["features"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is no folder saved by datasets ({first_line(error)})") from error


def read(source: str, query: Query) -> tuple[list[Row], tuple[str, ...] | None]:
    """Return the rows of a source, blank texts left out, and the names of its classes where it keeps them."""
    names = None
    if source == "builtin":
        records: Iterator[tuple[str, Mapping[str, Any]]] = (
            (f"builtin:{number}", {"text": text}) for number, text in enumerate((*read_corpus(), *everyday()), 1)
        )
    elif is_dataset(source):
        records, names = open_dataset(source, query)
    else:
        path = Path(source).expanduser()
        check_file(path)
        records = read_paragraphs(path) if path.suffix in RUNNING else read_records(path)
    rows = [row for place, record in records if (row := make_row(place, record, query)) is not None]
    if not rows:
        raise DataError(f"{source} holds no text")
    return rows, names


def make_row(place: str, record: Mapping[str, Any], query: Query) -> Row | None:
    """Return the row of a record, None where a text is blank; DataError where a column is missing."""
    wanted = (*query.texts, *(column for column in (query.label, query.domain) if column))
    for column in wanted:
        if column not in record:
            raise DataError(f"{place}: no column '{column}'; met {', '.join(record)}{nearest(column, record)}")
        if record[column] is None:
            raise DataError(f"{place}: column '{column}' has no value")
    texts = tuple(record[column] for column in query.texts)
    for column, text in zip(query.texts, texts, strict=True):
        if not isinstance(text, str | list):
            raise DataError(f"{place}: column '{column}' holds {type(text).__name__} {text!r}; expected text")
    if any(not (text.strip() if isinstance(text, str) else text) for text in texts):
        return None
    texts = tuple(tuple(map(str, text)) if isinstance(text, list) else text for text in texts)
    label, domain = (record[column] if column else None for column in (query.label, query.domain))
    return Row(texts, label, place, "" if domain is None else str(domain))


def read_paragraphs(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the paragraphs between blank lines of a text file, or its lines where it has no blank ones."""
    text = decode(path)
    pattern = r"(?:[^\n]*\S[^\n]*\n?)+" if re.search(r"\S[^\n]*\n[^\S\n]*\n", text) else r"[^\n]*\S[^\n]*"
    line, last = 1, 0
    for match in re.finditer(pattern, text):
        line += text.count("\n", last, match.start())
        last = match.start()
        yield f"{path}:{line}", {"text": match.group().strip()}


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and record of each row in a .jsonl, .json, .csv or .tsv file."""
    if path.suffix in (".csv", ".tsv"):
        yield from read_table(path)
        return
    lines = enumerate(decode(path).split("\n"), 1) if path.suffix == ".jsonl" else [(1, decode(path))]
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        records = value if path.suffix == ".json" and isinstance(value, list) else [value]
        for index, record in enumerate(records):
            place = f"{path}:{number}" if path.suffix == ".jsonl" else f"{path}[{index}]"
            if not isinstance(record, dict):
                expected = "an object with columns" if path.suffix == ".jsonl" else "a list of objects with columns"
                raise DataError(f"{place}: met {type(record).__name__}; expected {expected}")
            yield place, record


def read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and record of each row of a .csv, or of a .tsv, where a quotation mark is a mark like others."""
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    table = csv.reader(decode(path).split("\n"), strict=True, **dialect)
    try:
        header = next(table)
        for values in table:
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(f"{path}:{table.line_num}: met {len(values)} fields; the header has {len(header)}")
            yield f"{path}:{table.line_num}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{table.line_num}: {error}") from error


def decode(path: Path) -> str:
    """Return the text of a UTF-8 file; DataError where it is something else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as UTF-8 text: {error}") from error


def open_dataset(source: str, query: Query) -> tuple[Iterator[tuple[str, Mapping[str, Any]]], tuple[str, ...] | None]:
    """Open a folder saved by `datasets` or download a hub dataset; return its records and its class names."""
    import datasets

    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            dataset_columns(folder, query.split)
            opened = datasets.load_from_disk(str(folder))
            dataset = opened[query.split] if isinstance(opened, datasets.DatasetDict) else opened
        else:
            say(f"Reading the dataset {source} from the hub.")
            dataset = datasets.load_dataset(source, query.config, split=query.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source} can't be loaded: {first_line(error)}") from error
    feature = dataset.features.get(query.label) if query.label else None
    names = getattr(getattr(feature, "feature", feature), "names", None)
    wanted = [column for column in (*query.texts, query.label, query.domain) if column in dataset.column_names]
    records = ((f"{source}[{index}]", record) for index, record in enumerate(dataset.select_columns(wanted)))
    return records, tuple(names) if names else None
