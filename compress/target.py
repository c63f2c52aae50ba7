"""Target: the device, runtime and input shape that a model is made fast for, and the facts of the machine at hand.

Importing it starts neither torch nor a runtime, so that a plan can be checked in a moment.
"""

from __future__ import annotations

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field

from compress.contract import Options
from compress.tasks import TASKS

FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "bf16",
)
PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "torch": ("torch",),
    "transformers": ("transformers",),
}


class Target(Options):
    """Where the model will run: speed-ups are promised and measured here and nowhere else.

    `batch` and `sequence` are the shape whose latency counts; `threads` the CPU threads a runtime may use. With
    `generate` the latency is that of a whole request to a decoder: a prompt of `sequence` tokens runs and gives the
    first new token, and each of the `generate` - 1 others is a step of one token with the key-value cache.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    runtime: Literal["auto", "onnxruntime", "torch", "openvino"] = "auto"
    batch: int = Field(default=1, ge=1)
    sequence: int = Field(default=128, ge=1)
    generate: int | None = Field(default=None, ge=1, description="new tokens; null: one forward pass is timed")
    threads: int = Field(default=1, ge=1)
    dtype: Literal["float32"] = "float32"

    @property
    def chosen(self) -> str:
        """The runtime meant: `auto` is ONNX Runtime on a CPU and torch on a GPU.

        Latency tables need one before there is an artifact; the export `auto` tries all of them in the end.
        """
        if self.runtime != "auto":
            return self.runtime
        return "onnxruntime" if self.device == "cpu" else "torch"

    def tokens_per_second(self, milliseconds: float) -> float | None:
        """New tokens a second, over the whole batch, of requests that take so long; None where none are generated."""
        return None if self.generate is None else self.batch * self.generate / milliseconds * 1e3

    def problems(self, task: str | None = None) -> list[str]:
        """What this machine, or the task, lacks for this target, told as `field: what was met; what was expected`."""
        found = []
        if self.generate is not None and task is not None and not TASKS[task].generates:
            able = ", ".join(name for name, known in TASKS.items() if known.generates)
            found.append(f"generate: {self.generate} tokens asked of a model for {task}; expected null, or task {able}")
        if self.threads > (cores := len(available_cores())):
            found.append(f"threads: {self.threads} asked, this process may use {cores}; expected 1..{cores}")
        if find_spec(self.chosen) is None:
            extra = "[openvino]" if self.chosen == "openvino" else "[cuda]" if self.device == "cuda" else ""
            found.append(
                f"runtime: '{self.chosen}' is not installed; expected it here: pip install 'hf-compress{extra}'"
            )
        if self.device == "cuda" and not graphics_cards():
            found.append("device: 'cuda' asked, no NVIDIA GPU found; expected 'cpu' on this machine")
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Everything a measured time depends on besides the model: this target and this machine."""
        return {"target": {**self.model_dump(), "runtime": self.chosen}, "machine": machine()}


@functools.cache
def machine() -> dict[str, Any]:
    """Facts of this machine: processor, its cores and instruction sets, memory (GiB), GPUs, system, versions."""
    name, flags = _processor()
    return {
        "processor": name,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "available_cores": len(available_cores()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "graphics": graphics_cards(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name, packages in PACKAGES.items() if (found := _version(packages))},
    }


def available_cores() -> list[int]:
    """The processor cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def graphics_cards() -> list[str]:
    """Names of the NVIDIA GPUs that the Linux driver knows; empty where there is no driver."""
    lines = [
        line
        for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for line in card.read_text().splitlines()
    ]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def _processor() -> tuple[str, frozenset[str]]:
    """Name of the processor and its instruction sets, as Linux tells them."""
    source = Path("/proc/cpuinfo")
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    for line in source.read_text().splitlines() if source.exists() else ():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags = frozenset(value.split())
    return name, flags


def _version(packages: tuple[str, ...]) -> str | None:
    """Version of the first of these distributions that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
