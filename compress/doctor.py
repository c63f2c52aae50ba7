"""What this machine can do, and what that means for int8, bfloat16, 2:4 sparsity and honest timing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from compress.target import available_cores, machine

RUNTIMES = {"onnxruntime": "hf-compress", "torch": "hf-compress", "openvino": "hf-compress[openvino]"}
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}
BF16_CAPABILITY = SPARSE_CAPABILITY = 8.0  # NVIDIA Ampere


@dataclass(frozen=True)
class Finding:
    """One thing found, and what it means for compression here."""

    what: str
    found: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.what:<10} {self.found}\n{'':<11}{self.meaning}"


def examine() -> list[Finding]:
    """Look at processor, memory, GPUs, compilers and runtimes; imports no torch and starts no GPU."""
    return [_cores(), _vectors(), _int8(), _bfloat16(), _memory(), _gpu(), _compiler(), *_runtimes(), _clock()]


def bf16_pays() -> bool:
    """Whether training in bfloat16 is faster than in float32: on the GPU where there is one, else on the CPU."""
    if capabilities := gpus():
        return min(capabilities.values()) >= BF16_CAPABILITY
    return bool(BF16_FLAGS & set(machine()["flags"]))


def gpus() -> dict[str, float]:
    """NVIDIA GPUs that nvidia-smi lists and their compute capability, by index and name; empty without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--query-gpu=index,name,compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines()]
        return {f"{index}: {name}": float(capability) for index, name, capability in rows}
    except (subprocess.SubprocessError, ValueError, OSError):
        return {}


def _cores() -> Finding:
    here, free = machine(), len(available_cores())
    return Finding(
        "processor",
        f"{here['processor']}, {here['cores']} cores, {free} of its threads for this process",
        f"target.threads may be 1..{free}; latencies measured with one thread are the most repeatable",
    )


def _vectors() -> Finding:
    flags = set(machine()["flags"])
    widest = next((name for name in ("avx512f", "avx2", "asimddp") if name in flags), "none known")
    meaning = {
        "avx512f": "float32 matrix products run 16 numbers wide; widths in multiples of 16 use all of it",
        "avx2": "float32 matrix products run 8 numbers wide; widths in multiples of 8 use all of it",
        "asimddp": "float32 matrix products run 4 numbers wide; int8 has its own dot product",
    }.get(widest, "no wide instructions found; expect low speed in every format")
    return Finding("vectors", widest, meaning)


def _int8() -> Finding:
    flags = set(machine()["flags"])
    present = sorted(flags & INT8_FLAGS)
    if present:
        return Finding("int8", ", ".join(present), "int8 in ONNX Runtime can be 2-4x as fast as float32; measure it")
    if "asimddp" in flags:
        return Finding("int8", "asimddp", "int8 dot products: int8 can be about 2x as fast as float32; measure it")
    return Finding("int8", "no VNNI, no AMX", "int8 saves memory here, but little time; pruning widths saves both")


def _bfloat16() -> Finding:
    present = sorted(BF16_FLAGS & set(machine()["flags"]))
    if present:
        return Finding("bfloat16", ", ".join(present), "bfloat16 products are native; training with it is faster")
    return Finding("bfloat16", "not native on the CPU", "bfloat16 on this CPU is emulated and slower than float32")


def _memory() -> Finding:
    gibibytes = machine()["memory_gib"]
    # Weights, their copy in the teacher, gradients and two moments of Adam: five times four bytes a parameter.
    billions = gibibytes * 2**30 / 20 / 1e9
    return Finding(
        "memory", f"{gibibytes} GiB", f"recovery with a teacher fits models to about {billions:.1f} B parameters"
    )


def _gpu() -> Finding:
    found = gpus()
    if not found:
        return Finding(
            "gpu", "no NVIDIA GPU", "2:4 sparsity has no kernel here and buys no time; use structured pruning"
        )
    ampere = min(found.values()) >= SPARSE_CAPABILITY
    meaning = (
        "2:4 sparsity and bfloat16 have hardware here (Ampere or later)"
        if ampere
        else "2:4 sparsity and bfloat16 need compute capability 8.0 or more (Ampere); they buy no time here"
    )
    return Finding("gpu", "; ".join(f"{name} ({capability:g})" for name, capability in found.items()), meaning)


def _compiler() -> Finding:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or (str(path) if (path := Path(home, "bin", "nvcc")).is_file() else None)
    if found:
        return Finding("nvcc", found, "CUDA extensions can be compiled here")
    return Finding("nvcc", "not found", "no CUDA extension can be compiled here; nothing in a plan needs one")


def _runtimes() -> list[Finding]:
    versions = machine()["versions"]
    rows = []
    for name, package in RUNTIMES.items():
        if importlib.util.find_spec(name):
            rows.append(Finding("runtime", f"{name} {versions.get(name, '')}".strip(), "installed"))
        else:
            rows.append(Finding("runtime", f"{name} is missing", f"to have it: pip install '{package}'"))
    return rows


def _clock() -> Finding:
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.5 * len(available_cores()):
        return Finding(
            "clock", f"load {busy:.1f}", "other work is running: intervals of measured speed-ups will be wide"
        )
    return Finding("clock", f"load {busy:.1f}", "the machine is quiet enough to measure on")
