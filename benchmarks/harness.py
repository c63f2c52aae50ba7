"""What every suite shares: a figure is written with the machine, the command and the versions that made it."""

from __future__ import annotations

import json
import shlex
import sys
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
