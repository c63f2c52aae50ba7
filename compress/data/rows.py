"""Rows on disk: those that a step made or chose, one JSON object a line, in a file named by what it holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.data.sources import Row


def write_rows(splits: Mapping[str, Sequence[Row]], folder: Path) -> Path:
    """Write the rows of some splits, whole or not at all; equal rows have the same file."""
    lines = [
        json.dumps({"split": split, "texts": row.texts, "label": row.label, "place": row.place, "domain": row.domain})
        for split, rows in splits.items()
        for row in rows
    ]
    return write_lines(lines, folder / f"{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:20]}.jsonl")


def read_rows(path: Path) -> dict[str, list[Row]]:
    """The rows of each split that a file holds, in their order."""
    splits: dict[str, list[Row]] = {}
    for record in read_lines(path):
        texts = tuple(tuple(text) if isinstance(text, list) else text for text in record["texts"])
        splits.setdefault(record["split"], []).append(Row(texts, record["label"], record["place"], record["domain"]))
    return splits


def write_lines(lines: Sequence[str], path: Path) -> Path:
    """Write a file of lines so that a kill leaves none or all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def read_lines(path: Path) -> list[Any]:
    """The JSON values of a file of lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
