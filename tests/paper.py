"""A state of a tiny model with its texts, on a machine made of paper, where every unit takes a known time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

import compress.latency
import compress.measure
from compress.contract import STATISTICS
from compress.families import layout_of
from compress.measure import Timing
from compress.runtimes import open_artifact
from compress.state import State, Teacher, Workshop
from compress.statistics import moments
from compress.target import Target
from compress.tasks import TASKS
from exporters.onnx import Onnx
from tests.conftest import answer

EVERYTHING = 3.0  # milliseconds of a paper model that no axis accounts for
PER_UNIT = {"heads": 1.0, "columns": 0.1}


class Texts:
    """Calibration text as Data gives it."""

    def __init__(self, tiny, rows=40):
        self.rows = rows
        generator = torch.Generator().manual_seed(7)
        example = tiny.example(rows, 9)
        self.tensors = {
            name: torch.randint(3, 50, x.shape, generator=generator) if name.endswith("_ids") else x.clone()
            for name, x in example.items()
        }

    def count(self, split):
        return self.rows if split == "calibration" else 0

    def batches(self, split, size, *, seed=None, drop_last=False):
        for start in range(0, self.rows, size):
            yield {name: x[start : start + size] for name, x in self.tensors.items()}


class Paper:
    """A machine whose every unit takes its time, and the whole model `slower` times what the table says."""

    def __init__(self, slower=1.0):
        self.slower = slower
        self.built = 0

    def table(self, model, layout, target, inputs, folder):
        def milliseconds(name, size):
            return size * PER_UNIT[layout.axes[name].kind]

        return SimpleNamespace(milliseconds=milliseconds, sizes=lambda name: list(range(layout.axes[name].units + 1)))

    def build(self, state, model, folder):
        units = sum(axis.units * PER_UNIT[axis.kind] for axis in layout_of(model).axes.values())
        folder.mkdir(parents=True)
        (folder / "time").write_text(str(EVERYTHING + units * self.slower))
        self.built += 1

    def measure(self, artifacts, target, **bounds):
        return [Timing.of([float((path / "time").read_text())] * 10) for path in artifacts]

    def install(self, monkeypatch):
        """Let this machine stand for the real one."""
        monkeypatch.setattr(compress.latency, "table", self.table)
        monkeypatch.setattr(compress.measure, "measure", self.measure)
        monkeypatch.setattr(State, "build", lambda state, model, folder: self.build(state, model, folder))


def state_of(tiny, folder):
    """A state of a tiny model with its statistics."""
    task = TASKS["text-generation" if tiny.auto == "AutoModelForCausalLM" else "feature-extraction"]
    model = tiny.build()
    teacher = Teacher("dense", task)
    teacher.model = tiny.build()
    state = State(
        model, None, layout_of(model), task, Target(), Workshop(folder / "step", folder / "run"), teacher, Texts(tiny)
    )  # fmt: skip
    readers = sorted({site.module for axis in state.layout.axes.values() for site in axis.readers})
    state.give(STATISTICS, moments(model, readers, state.data.batches("calibration", 16)))
    return state


def error_in_int8(tiny, folder, *passes, **export):
    """Squared error of a tiny decoder's int8 artifact, with two channels of every norm a hundred times as large, and
    what reads them as small; after some passes, whose figures stand beside it."""
    state = state_of(tiny, folder / "state")
    with torch.no_grad():
        for name, module in state.model.named_modules():
            if name.endswith("layernorm"):
                module.weight[:2] *= 100
            elif name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                module.weight[:, :2] /= 100
    inputs = tiny.example(3, 7)
    expected = answer(state.model, inputs).numpy()
    state.dense.source = "dense"
    for one in passes:
        (state,) = one.run(state)
    Onnx(cache=False, **export).run(state, folder / "made")
    mask = inputs["attention_mask"].numpy().astype(bool)
    met = next(iter(open_artifact(folder / "made", Target())(inputs).values()))[mask].flatten()
    return float(np.square(met - expected).mean()), state.figures
