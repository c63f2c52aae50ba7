"""What every suite shares: a figure is written with the machine, the command and the versions that made it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.target import machine

RESULTS = Path(__file__).parent / "results"
PLACES = (
    "--out",
    "--data",
    "--model",
    "--models",
)  # options that say where things lie on one machine, and change no figure
VERSIONS = ("torch", "transformers", "onnxruntime", "onnx", "onnxscript", "accelerate", "numpy")


def options(
    doc: str | None, out: str = "", language_model: bool = False, tuned: bool = False
) -> argparse.ArgumentParser:
    """A suite's options with those that suites share: where texts and, if named, what it leaves lie; its model.

    The model is a language model, which must be given, or one that is `tuned` where none is given.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("HF_COMPRESS_DATA")
    made.add_argument("--data", type=Path, default=data, required=data is None, help="folder, or HF_COMPRESS_DATA")
    if out:
        made.add_argument("--out", type=Path, default=Path("out", "benchmarks", out))
    if language_model:
        made.add_argument("--model", required=True, help="its folder")
        made.add_argument("--name", required=True, help="what the model is called in the results")
        made.add_argument("--source", required=True, help="text below the folder of data")
    if tuned:
        made.add_argument("--model", help="a model that is fine-tuned already, so that it need not be done here")
    return made


def folder_of(branch: Mapping[str, Any], kind: str) -> str:
    """Where a branch's artifact of a kind lies."""
    return next(item["path"] for item in branch["artifacts"] if item["kind"] == kind)


def record(name: str, figures: dict[str, Any]) -> Path:
    """Write one suite's figures to results/<name>.json."""
    module = sys.modules["__main__"].__spec__
    words = [one for before, one in zip(sys.argv, sys.argv[1:], strict=False) if not {before, one} & set(PLACES)]
    command = ["python", "-m", module.name if module else sys.argv[0], *words]
    content = {
        "command": shlex.join(command),
        "machine": machine(),
        "versions": {package: version(package) for package in VERSIONS},
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any] | None:
    """The recorded content of a suite, or None where it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
