"""The kernels under sanitizers: no address past an array, nothing that the language leaves undefined."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from compress.sparse.library import FOLDER

FUZZ = Path(__file__).parent / "sanitized" / "fuzz.cpp"
FLAGS = (
    "-std=c++17",
    "-g",
    "-O1",
    "-w",
    "-ffp-contract=off",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_kernels_stay_within_their_arrays(tmp_path: Path) -> None:
    units = [str(path) for path in sorted(FOLDER.glob("*.cpp"))]
    subprocess.run(["g++", *FLAGS, str(FUZZ), *units, "-o", str(tmp_path / "fuzz")], check=True)
    done = subprocess.run([str(tmp_path / "fuzz"), "200"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout == "all right\n"
