"""`auto`: every runtime and precision is tried, the fastest that keeps quality stays, and its speed-up is explained."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress import compress, outcome
from compress.errors import ExportError
from compress.exports import quality
from compress.measure import Timing, apart
from compress.report import check
from compress.runtimes import runtime_of
from compress.target import Target
from exporters.auto import TRIED, Auto
from exporters.onnx import Onnx
from exporters.openvino import OpenVino
from tests.world import make_world

DENSE = {"onnxruntime": 12.0, "openvino": 8.0, "torch": 24.0}
ARTIFACTS = {"onnx": 6.0, "onnx-int8_dynamic": 3.0, "onnx-int8_static": 1.0, "openvino": 5.0, "openvino-int8": 4.0}
ARTIFACTS |= {"model": 16.0}


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Times and scores that are written here; yields which artifacts were timed together."""
    made: list[list[str]] = []
    worse: set[Path] = set()

    def timed(artifacts: list[Path], target: Target) -> list[Timing]:
        made.append([path.name for path in artifacts])
        assert {runtime_of(path).name for path in artifacts} == {target.chosen}
        dense, *others = artifacts
        assert dense.parent.name == "dense"
        return [Timing.of([DENSE[target.chosen]] * 10), *(Timing.of([ARTIFACTS[one.name]] * 10) for one in others)]

    def scored(folder: Path, model: Any, state: Any, what: str = "the model") -> dict[str, Any]:
        if "int8_static" in what:
            worse.add(folder)  # it may lie elsewhere the next time
        found = quality(folder, model, state, what)
        return {**found, "quality": {**found["quality"], "cosine": 0.9 if folder in worse else 0.999}}

    make_world(tmp_path)
    monkeypatch.setattr(outcome, "measure", timed)
    monkeypatch.setattr("compress.exports.quality", scored)
    monkeypatch.setattr("compress.outcome.quality", scored)
    return made


def plan_of(world: Path, **options: Any) -> dict[str, Any]:
    data, passes = {"source": str(world / "reviews.txt")}, ["calibrate"]
    return {"model": str(world / "my-encoder"), "data": data, "passes": passes, "export": [{"auto": options}]}


def test_the_fastest_that_keeps_quality_stays_and_its_speed_is_explained(
    tmp_path: Path, paper: list[list[str]]
) -> None:
    result = compress(plan=plan_of(tmp_path), out=tmp_path / "out")
    (branch,) = check(result.report).branches
    rows = {Path(one.path).name if one.kept else f"{one.kind} {one.precision}": one for one in branch.artifacts}
    assert len(branch.artifacts) == len(TRIED) - 1  # all but weight_only: no grid was made
    best = rows["onnx-int8_dynamic"]
    assert [one for one in branch.artifacts if one.kept] == [best]
    assert best.reason.startswith("the fastest of 6 tried")
    assert "cosine 0.9 against 0.999" in rows["onnx int8_static"].reason
    assert rows["openvino int8"].reason == "4 ms, where the fastest takes 3 ms"
    assert (best.factors.runtime, best.factors.structure, best.factors.precision) == (1.0, 2.0, 2.0)
    other = rows["openvino int8"].factors
    assert (other.runtime, other.structure, other.precision) == (1.5, 1.6, 1.25)
    for one in branch.artifacts:
        factors = (one.factors.runtime, one.factors.structure, one.factors.precision)
        assert math.prod(factors) == pytest.approx(one.measured_speedup)
    assert [path.name for path in (tmp_path / "out" / "auto").iterdir()] == ["onnx-int8_dynamic"]
    assert sorted(map(len, paper)) == [2, 3, 4]
    told = (tmp_path / "out" / "report.md").read_text()
    assert "1.50x runtime, 1.60x structure, 1.25x precision" in told
    assert "1.50x runtime, 1.60x structure, 1.25x precision" in (tmp_path / "out" / "report.html").read_text()
    again = compress(plan=plan_of(tmp_path), out=tmp_path / "out")
    assert again.report["branches"] == result.report["branches"]
    assert len(paper) == 3  # nothing is timed twice
    looser = compress(plan=plan_of(tmp_path, max_drop=0.2), out=tmp_path / "out")
    (best,) = [one for one in looser.report["branches"][0]["artifacts"] if one["kept"]]
    assert best["precision"] == "int8_static"
    assert all(artifact.intact() for artifact in looser.artifacts)


def test_what_can_not_be_made_is_told(tmp_path: Path, paper: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ExportError("openvino: not here")

    monkeypatch.setattr(OpenVino, "write", missing)
    result = compress(plan=plan_of(tmp_path), out=tmp_path / "out")
    (branch,) = result.report["branches"]
    assert branch["refused"] == dict.fromkeys(("openvino", "openvino-int8"), "openvino: not here")
    assert "openvino-int8 not made; openvino: not here" in (tmp_path / "out" / "report.md").read_text()


def test_weight_only_is_tried_where_there_is_a_grid(tmp_path: Path) -> None:
    wanted = Onnx(quantize="weight_only")
    assert wanted in Auto().candidates(SimpleNamespace(facts={"grid": {}}))
    assert wanted not in Auto().candidates(SimpleNamespace(facts={}))


def test_times_of_two_processes_are_compared_without_pairing() -> None:
    one, two = Timing.of([2.0, 2.1, 1.9] * 8), Timing.of([1.0] * 30)
    found = apart(one, two)
    assert found.value == pytest.approx(2.0)
    assert found.low < 2.0 < found.high
