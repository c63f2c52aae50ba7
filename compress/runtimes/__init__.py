"""The runtimes a model can be deployed in, and how to tell which one an artifact on disk is for."""

from __future__ import annotations

from pathlib import Path

from compress.errors import TargetError
from compress.runtimes.base import Artifact, Runtime, Session
from compress.runtimes.examples import example_inputs
from compress.runtimes.onnx import OnnxRuntime
from compress.runtimes.openvino import OpenVino
from compress.runtimes.torch import TorchRuntime
from compress.target import Target

__all__ = ["RUNTIMES", "Artifact", "Runtime", "Session", "example_inputs", "open_artifact", "runtime_of", "takes"]

RUNTIMES: dict[str, Runtime] = {one.name: one for one in (OnnxRuntime(), TorchRuntime(), OpenVino())}


def runtime_of(path: Path) -> Runtime:
    """The runtime whose artifact `path` is; raises TargetError where it is none's."""
    path = Path(path)
    if not path.exists():
        raise TargetError(f"{path}: no such file or folder; expected a model folder or an .onnx file")
    for runtime in RUNTIMES.values():
        if runtime.holds(path):
            return runtime
    met = ", ".join(sorted(file.name for file in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise TargetError(
        f"{path}: holds {met or 'nothing'}; expected model.onnx, openvino_model.xml, config.json with .safetensors, or "
        "an .onnx file"
    )


def takes(target: Target, path: Path, generates: bool) -> bool:
    """Whether the target's runtime takes an artifact, with its cache if text is to be generated."""
    runtime = RUNTIMES[target.chosen]
    return runtime.holds(path) and (runtime.generates(path) or not generates)


def open_artifact(path: Path, target: Target) -> Session:
    """Open an artifact in its own runtime, on the target's device with the target's threads."""
    return runtime_of(path).open(Path(path), target)
