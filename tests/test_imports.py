"""What importing and checking cost, and what importing must not do."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

LIGHT = ("compress", "passes", "exporters", "compress.plan", "compress.cli", "compress.target", "compress.data")
HEAVY = ("torch", "transformers", "datasets", "onnxruntime", "matplotlib", "accelerate")


@pytest.mark.parametrize("name", LIGHT)
def test_importing_starts_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print([one for one in {HEAVY} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_torch_side_modules_starts_no_cuda() -> None:
    code = "import torch, compress.api, compress.runner, compress.outcome; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_compress_is_quicker_than_importing_transformers() -> None:
    def seconds(code: str) -> float:
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            taken.append(time.perf_counter() - started)
        return min(taken)

    assert seconds("import compress") < 1.5 * seconds("import transformers")
