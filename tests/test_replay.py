"""What is timed on a GPU is replayed: a GPU made of paper counts what it is asked."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from compress import latency, replay
from compress.errors import TargetError
from compress.families import layout_of
from compress.parts import Part, cut
from compress.runtimes.torch import TorchSession
from compress.target import Target
from tests.conftest import TINY

GPU = SimpleNamespace(type="cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the GPU; a captured call takes as many milliseconds as its matrices have thousands."""
    found: list[str] = []

    def captured(call):
        call()
        found.append("captured")
        size = sum(weight.numel() for weight in call.func.parameters()) / 1e3
        again = lambda: found.append("replayed")  # noqa: E731
        again.size = size
        return again

    def elapsed(calls):
        for call in calls:
            call()
        return [call.size for call in calls]

    monkeypatch.setattr(replay, "captured", captured)
    monkeypatch.setattr(replay, "elapsed", elapsed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("waited"))
    monkeypatch.setattr(Part, "to", lambda part, device: part)
    moved = torch.Tensor.to

    def to(x, *where, **how):
        return x if where[:1] in (("cuda",), (GPU,)) else moved(x, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return found


@pytest.mark.parametrize("generate", [None, 5])
def test_a_table_for_a_gpu_is_of_replayed_graphs(generate: int | None, asked, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    model = TINY["llama"].build()
    layout, target = layout_of(model), Target(device="cuda", sequence=9, batch=2, generate=generate)
    table = latency.table(model, layout, target, TINY["llama"].example(), tmp_path)
    axis = next(one for one in layout.axes.values() if one.kind == "columns")
    whole, least = (
        sum(weight.numel() for weight in cut(model, layout, axis.block, {axis.name: size}).parameters())
        for size in (axis.units, axis.least)
    )
    expected = (whole - least) / 1e3 * (generate or 1)
    assert table.milliseconds(axis.name, axis.units) == pytest.approx(expected, rel=1e-5)
    assert asked.count("replayed") >= 10 * asked.count("captured") > 0
    assert "waited" not in asked


def test_a_model_on_a_gpu_is_timed_as_a_graph(asked, monkeypatch) -> None:
    session = TorchSession(TINY["bert"].build(), Target())
    inputs = session.example(2, 9)
    assert session.ready(inputs)().keys() == session(inputs).keys()
    monkeypatch.setattr(type(session.model), "device", GPU)
    session.ready(inputs)()
    assert asked == ["captured", "replayed", "waited"]

    def waits(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "captured", waits)
    with pytest.raises(TargetError, match="torch: BertModel can't be captured as a graph: operation not permitted"):
        session.ready(inputs)


def test_a_captured_call_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda one: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    held = torch.ones(3)
    seen = weakref.ref(held)
    again = replay.captured(lambda held=held: held + 1)
    del held
    gc.collect()
    assert seen() is not None
    again()
