"""The kernels' shared library: compiled when it is first wanted, kept by the content of its sources, called from C.

It needs a C++ compiler (`CXX`, or the first of c++, g++ and clang++) and nothing else; no header of torch or of ONNX
Runtime is read, so that one library serves every version of both. Where there is no compiler, the reference does the
same in torch, and says so once.

ONNX Runtime takes a library of its own, of the same sources: it runs products on the threads of the session, so it has
none, and needs nothing but the C library of the machine that it is brought to.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from compress.errors import TargetError
from compress.progress import say

FOLDER = Path(__file__).parent / "kernels"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-w")
FOR_ONNX = (*(flag for flag in FLAGS if flag != "-fopenmp"), "-static-libstdc++", "-static-libgcc")
PATHS = {"best": -1, "plain": 0, "avx2": 1, "avx512": 2}  # as kernels/sparse.h counts them

LONG, POINTER = ctypes.c_long, ctypes.c_void_p


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library, compiled now if it never was; None, told once, where it can't be had."""
    try:
        library = ctypes.CDLL(str(built(cache_folder())))
    except (OSError, subprocess.CalledProcessError) as error:
        told = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else [str(error)]
        say(f"sparse kernels can't be compiled, so products of packed layers are dense and slow: {(told or [''])[0]}")
        return None
    library.hf_compress_blocks.argtypes = [ctypes.c_int, ctypes.c_int, LONG, LONG, LONG, *[POINTER] * 9]
    library.hf_compress_bitmap.argtypes = [
        *(ctypes.c_int, ctypes.c_int, LONG, LONG, LONG),
        *(POINTER, POINTER, POINTER, POINTER, ctypes.c_int, POINTER, POINTER),
    ]
    return library


def onnx_library() -> Path:
    """The file that ONNX Runtime's `register_custom_ops_library` takes; raises TargetError where it can't be had."""
    try:
        return built(cache_folder(), FOR_ONNX)
    except (OSError, subprocess.CalledProcessError) as error:
        raise TargetError(f"onnxruntime: packed layers need their kernels, which can't be compiled: {error}") from error


def paths() -> list[str]:
    """The sets of instructions that this processor has kernels for, the plainest first."""
    library = kernels()
    return [] if library is None else list(PATHS)[1 : library.hf_compress_best_path() + 2]


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf-compress")


def built(folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library in a folder, compiled aside and renamed where it isn't there yet.

    Raises FileNotFoundError where there is no compiler, CalledProcessError where it refuses.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    sources = sorted(FOLDER.iterdir())
    content = hashlib.sha256(b"".join(source.read_bytes() for source in sources) + str((compiler, flags)).encode())
    path = folder / f"sparse-{content.hexdigest()[:16]}.so"
    if path.exists():
        return path
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; expected c++, g++ or clang++")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside, path.name)
        units = [str(source) for source in sources if source.suffix == ".cpp"]
        subprocess.run([compiler, *flags, *units, "-o", str(made)], check=True, capture_output=True, text=True)
        made.replace(path)
    return path
