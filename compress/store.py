"""Stored states: one folder a node of the graph, written whole or not at all, found again by its key."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import checkpoint
from compress.contract import ROWS
from compress.data import Data
from compress.errors import ReachError
from compress.families import layout_of
from compress.state import FactValue, State, Teacher, Workshop
from compress.target import Target

MODEL, STATE, MISSED = "model", "state.json", "missed.json"


def keep(state: State, folder: Path, row: dict[str, Any]) -> None:
    """Write a state and its ledger row to `folder`; until the last rename nothing of that name exists."""
    with _whole(folder) as unfinished:
        checkpoint.save(state.model, unfinished / MODEL, state.tokenizer)
        plain: dict[str, dict[str, Any]] = {}
        for name, value in state.facts.items():
            tensors = {key: item.contiguous() for key, item in value.items() if isinstance(item, Tensor)}
            plain[name] = {key: item for key, item in value.items() if key not in tensors}
            if tensors:
                save_file(tensors, unfinished / f"{name}.safetensors")
        if state.dense.source is None:  # this step made the dense model, so it is the model stored here
            state.dense.source = str(folder / MODEL)
        inside = Path(state.dense.source).is_relative_to(folder.parent)  # beside it, so the run's folder may move
        dense = {"stored": os.path.relpath(state.dense.source, folder)} if inside else {"source": state.dense.source}
        written = {"dense": dense, "facts": plain, "kept": state.kept, "row": row}
        (unfinished / STATE).write_text(json.dumps(written))


def miss(missed: ReachError, folder: Path) -> None:
    """Write to `folder` that no model could be what was asked of this one, and why."""
    with _whole(folder) as unfinished:
        (unfinished / MISSED).write_text(json.dumps({"reason": str(missed), "fastest": missed.fastest}))


def missed(folder: Path) -> ReachError | None:
    """Why a stored node has no model; None where it has one."""
    if not (folder / MISSED).exists():
        return None
    written = json.loads((folder / MISSED).read_text())
    return ReachError(written["reason"], written["fastest"])


def recall(folder: Path, target: Target, data: Data, workshop: Workshop, teacher: Callable[[str], Teacher]) -> State:
    """Read a state back; the model comes through plain `from_pretrained`, its teacher from `teacher` by source."""
    written = json.loads((folder / STATE).read_text())
    dense = teacher(dense_of(folder))
    model, tokenizer = checkpoint.load(folder / MODEL, dense.task)
    facts: dict[str, FactValue] = {}
    for name, plain in written["facts"].items():
        tensors = folder / f"{name}.safetensors"
        facts[name] = {**plain, **(load_file(tensors) if tensors.exists() else {})}
    for name in facts.get(ROWS.name, {"files": []})["files"]:
        data = data.with_rows(workshop.run / ROWS.name / name)
    data = data if tokenizer is None else data.retokenized(tokenizer)
    return State(
        model, tokenizer, layout_of(model), dense.task, target, workshop, dense, data, facts, kept=written["kept"]
    )  # fmt: skip


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name of `folder` in the end."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def row_of(folder: Path) -> dict[str, Any]:
    """The ledger row of a stored node."""
    return json.loads((folder / STATE).read_text())["row"]


def dense_of(folder: Path) -> str:
    """The folder or hub name of a stored node's dense model."""
    dense = json.loads((folder / STATE).read_text())["dense"]
    return dense["source"] if "source" in dense else str((folder / dense["stored"]).resolve())


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a kill leaves the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value))
    os.replace(unfinished, path)
