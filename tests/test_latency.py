"""Measuring and latency tables: structure of times, never their values, as the machine may be busy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compress import latency
from compress.errors import LayoutError, TargetError
from compress.families import layout_of
from compress.latency import Curve, levels, table, thinned
from compress.layout import Axis
from compress.measure import Timing, interleave, measure, quantised, speedup
from compress.target import Target
from tests.conftest import TINY

TORCH = Target(runtime="torch", sequence=12)


def product(path, width):
    """An ONNX file that multiplies (64, width) by (width, width)."""
    weight = onnx.numpy_helper.from_array(np.ones((width, width), dtype=np.float32), "w")
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [64, width])
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [64, width])
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [given], [made], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_measuring_tells_the_larger_from_the_smaller(tmp_path):
    small, same, large = (product(tmp_path / f"{name}.onnx", width) for name, width in
                          (("small", 256), ("same", 256), ("large", 768)))  # fmt: skip
    timings = measure([small, same, large], Target(), seconds=2.0)
    assert len({len(timing.samples) for timing in timings}) == 1
    for timing in timings:
        assert 0 < timing.low <= timing.milliseconds <= timing.high
    ratio = speedup(timings[0], timings[1])
    assert ratio.low < 1.5
    assert ratio.high > 0.67
    assert speedup(timings[2], timings[0]).value > 2  # nine times the work


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system doesn't tell who stood in line")
def test_measuring_tells_that_others_had_the_core(tmp_path):
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # which the processes below inherit
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        (timing,) = measure([product(tmp_path / "a.onnx", 256)], Target(), seconds=2.0)
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, cores)
    assert 0.2 < timing.waited < 0.9
    assert timing.crowded


def test_measuring_says_what_went_wrong(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_text("no graph")
    with pytest.raises(TargetError, match=r"broken\.onnx: ONNX Runtime can't open it"):
        measure([broken], Target())
    TINY["bert"].build().save_pretrained(tmp_path / "torch")
    with pytest.raises(TargetError, match="one runtime"):
        measure([product(tmp_path / "a.onnx", 8), tmp_path / "torch"], Target())


def test_measuring_takes_torch_artifacts(tmp_path):
    TINY["bert"].build().save_pretrained(tmp_path)
    (timing,) = measure([tmp_path], Target(batch=2, sequence=8), seconds=0.2)
    assert timing.milliseconds > 0


def test_pairing_cancels_what_slows_both():
    noise = np.random.default_rng(0).lognormal(sigma=1.0, size=60)
    ratio = speedup(Timing.of(2.0 * noise), Timing.of(noise))
    assert ratio == pytest.approx((2.0, 2.0, 2.0))
    with pytest.raises(TargetError, match="one measurement"):
        speedup(Timing.of([1.0, 2.0]), Timing.of([1.0]))


def test_interval_widens_with_noise_and_repeats():
    draw = np.random.default_rng(1)
    calm, wild = (Timing.of(10 + spread * draw.standard_normal(50)) for spread in (0.01, 1.0))
    assert calm.high - calm.low < wild.high - wild.low
    assert speedup(calm, wild) == speedup(calm, wild)


def test_ticks_of_the_scheduler_are_recognised():
    draw = np.random.default_rng(2)
    assert quantised(4.0 * draw.integers(1, 4, size=50) + 0.005 * draw.standard_normal(50))
    assert not quantised(draw.uniform(5, 15, size=50))
    assert not quantised(np.full(50, 0.01))


def test_rounds_time_every_call_right_after_itself_in_changing_order():
    order: list[int] = []
    samples = interleave([lambda i=i: order.append(i) for i in range(5)], seconds=10, rounds=12)
    assert [len(times) for times in samples] == [12] * 5
    warm, timed = np.array(order[-120:]).reshape(12, 5, 2).transpose(2, 0, 1)
    assert (warm == timed).all()
    assert (np.sort(timed, axis=1) == np.arange(5)).all()
    assert len({tuple(row) for row in timed}) > 1


@pytest.mark.parametrize("units", [0, 1, 7, 29, 64, 256, 1536, 3072, 14336])
@pytest.mark.parametrize("kind", ["heads", "columns"])
def test_levels_reach_from_least_to_all(kind, units):
    for least in {0, min(1, units)}:
        found = levels(Axis("a", kind, "", units, (), least=least))
        assert found == sorted(set(found))
        assert (found[0], found[-1]) == (least, units)
        few = thinned(found, 5)
        assert len(few) <= 5
        assert set(few) <= set(found)
        assert (few[0], few[-1]) == (least, units)
        if kind == "columns" and units >= 256:
            assert all(size % 8 == 0 for size in found[1:])
            assert len(found) < 60


def test_noise_never_makes_more_units_faster():
    curve = Curve.of([0, 1, 2, 3], [5.0, 4.9, 7.0, 6.5], [0, 1, 2, 3])
    assert curve.raw == pytest.approx((0.0, -0.1, 2.0, 1.5))
    assert curve.milliseconds == pytest.approx((0.0, 0.0, 2.0, 2.0))


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.1)
    monkeypatch.setattr(latency, "MOST_MEASURED", 3)
    monkeypatch.setattr(latency, "MOST_SHARED", 2)


@pytest.mark.usefixtures("hasty")
def test_every_axis_of_every_family_has_times(tiny, tmp_path):
    model = tiny.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, layout = model.config.to_dict(), layout_of(model)
    times = table(model, layout, TORCH, tiny.example(1, 12), tmp_path)
    for axis in layout.axes.values():
        offered = times.sizes(axis.name)
        assert offered[-1] == axis.units
        took = [times.milliseconds(axis.name, size) for size in offered]
        assert took[0] == 0.0
        assert took == sorted(took)
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("hasty")
def test_stored_tables_are_read_only_where_all_is_equal(tmp_path, monkeypatch):
    model, inputs = TINY["bert"].build(), TINY["bert"].example(1, 12)
    measured = []
    real = latency._measured
    monkeypatch.setattr(latency, "_measured", lambda *args: measured.append(1) or real(*args))
    layout = layout_of(model)
    first = table(model, layout, TORCH, inputs, tmp_path)
    assert table(model, layout, TORCH, inputs, tmp_path) == first
    assert len(measured) == 1
    table(model, layout, TORCH.model_copy(update={"sequence": 11}), inputs, tmp_path)
    assert len(measured) == 2
    table(model, layout.cut(model, "encoder.layer.1.heads", [0]), TORCH, inputs, tmp_path)
    assert len(measured) == 3
    with pytest.raises(LayoutError, match="did you mean"):
        first.milliseconds("encoder.layer.0.head", 1)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "name",
    ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "vit", "whisper", "t5"))],
)
def test_tables_in_runtimes_of_graphs(name, runtime, tmp_path):
    model = TINY[name].build()
    layout = layout_of(model)
    times = table(model, layout, Target(sequence=12, runtime=runtime), TINY[name].example(1, 12), tmp_path)
    assert times.curves.keys() == layout.axes.keys()
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
