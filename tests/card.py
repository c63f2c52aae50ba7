"""A GPU made of paper: what operators are asked for is told, and computed by the kernels' own sources on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from compress.sparse import gpu
from compress.sparse.device import Kernels, built


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU")
    flags = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w", f"-I{Path(__file__).parent}", "-x", "c++")
    return Kernels(built(tmp_path_factory.mktemp("emulated"), ("g++", *flags)))


@pytest.fixture(params=["rising", "falling"])
def lanes(emulated: Kernels, request: pytest.FixtureRequest) -> Kernels:
    """The kernels, their lanes run in both orders."""
    emulated.library.hf_compress_emulated_order(int(request.param == "falling"))
    return emulated


class Card(TorchDispatchMode):
    """Inside, `asked` are the operators of ours that were called; `computed` gives what computes some of them."""

    def __init__(self, computed: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.computed = computed or {}

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operator.namespace != "hf_compress":
            return operator(*arguments, **(named or {}))
        name = operator._opname
        self.asked.append(name)
        return self.computed.get(name, operator)(*arguments, **(named or {}))


@pytest.fixture
def card(emulated: Kernels, monkeypatch: pytest.MonkeyPatch) -> Card:
    """What a GPU would compute: the operators' implementations for it, with emulated kernels."""
    monkeypatch.setattr(gpu, "kernels_on", lambda device: emulated)
    return Card(gpu.CARD)
