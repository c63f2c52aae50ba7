"""Kernels for NVIDIA GPUs: compiled by nvcc when they are first wanted, kept by the content of their sources and the
GPU's generation, called through C.

They are plain CUDA C++ that takes pointers, sizes and a stream, and not an extension of torch: so one library serves
every version of torch, whose headers take a minute to compile and whose ABI changes, and nothing is needed besides
nvcc. What torch must know of them is told through `torch.library` (`gpu.py`). Where there is no nvcc the reference does
the same in torch, and says so once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.progress import say
from compress.sparse.library import cache_folder

FOLDER = Path(__file__).parent / "cuda"
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
OLDEST = (8, 0)  # generation of GPUs that multiply bf16 and copy to shared memory by themselves

Argument = Tensor | int | ctypes.c_long | None


class Kernels:
    """A compiled library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.hf_compress_error.restype = ctypes.c_char_p

    def __call__(self, name: str, result: Tensor, *arguments: Argument) -> Tensor:
        """Queue a kernel that writes `result`, on the stream that is current there; whole numbers are C's int.

        Raises RuntimeError where it can't be launched; what goes wrong while it runs is told by a later call, as for
        all that a GPU does.
        """
        device, stream = 0, None
        if result.is_cuda:
            device, stream = result.device.index, torch.cuda.current_stream(result.device).cuda_stream
        given: list[Any] = [ctypes.c_int(device), ctypes.c_void_p(stream)]
        given += [_as_c(one) for one in (*arguments, result)]
        if failed := getattr(self.library, f"hf_compress_{name}")(*given):
            told = self.library.hf_compress_error(failed).decode()
            raise RuntimeError(f"kernel {name} can't be launched: {told}")
        return result


def kernels_on(device: torch.device) -> Kernels | None:
    """The library for a GPU, compiled now if it never was; None, told once, where it can't be had."""
    return _kernels(*torch.cuda.get_device_capability(device))


@functools.cache
def _kernels(major: int, minor: int) -> Kernels | None:
    if (major, minor) < OLDEST:
        say(f"GPUs of generation {major}.{minor} have no sparse kernels; expected 8.0 or newer, so products are dense")
        return None
    try:
        return Kernels(built(cache_folder(), command(major, minor)))
    except (OSError, subprocess.CalledProcessError) as error:
        told = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else [str(error)]
        say(f"sparse GPU kernels can't be compiled, so products of packed layers are dense: {(told or [''])[0]}")
        return None


def command(major: int, minor: int) -> tuple[str, ...]:
    """How nvcc is called for a generation; raises FileNotFoundError where there is none."""
    nvcc = shutil.which("nvcc") or next((str(one) for one in Path("/usr/local").glob("cuda*/bin/nvcc")), None)
    if nvcc is None:
        raise FileNotFoundError("no nvcc found; expected the CUDA toolkit's compiler on PATH")
    return (nvcc, *FLAGS, f"-arch=sm_{major}{minor}{'a' if major == 9 else ''}")


def built(folder: Path, command: Sequence[str]) -> Path:
    """The library that a compiler makes of all sources, in a folder; compiled aside and renamed if it isn't there."""
    sources = sorted(FOLDER.iterdir())
    content = hashlib.sha256(b"".join(source.read_bytes() for source in sources) + str(command).encode())
    path = folder / f"sparse-gpu-{content.hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside, path.name)
        units = [str(source) for source in sources if source.suffix == ".cu"]
        subprocess.run([*command, "-o", str(made), *units], check=True, capture_output=True, text=True)
        made.replace(path)
    return path


def _as_c(one: Argument) -> ctypes.c_int | ctypes.c_long | ctypes.c_void_p:
    if isinstance(one, Tensor):
        return ctypes.c_void_p(one.data_ptr())
    if one is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int(one) if isinstance(one, int) else one
