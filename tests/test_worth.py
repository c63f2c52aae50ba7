"""Steps that must pay: measured as what leaves, dropped with their figures where they don't, and the rest goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from compress import compress, outcome, worth
from compress.errors import PlanError
from compress.measure import Timing
from compress.plan import Plan, Tables
from compress.report import check
from compress.target import Target
from exporters import EXPORTERS
from passes import PASSES
from tests.world import make_world

GPTQ = {"gptq": {"bits": 4, "group": 16, "samples": 8}}
EXPORT = ["huggingface", "onnx", {"onnx": {"quantize": "weight_only"}}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worth")
    make_world(folder)
    return folder


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Times that are written here: what is weight-only takes half; yields what steps were measured as."""
    seen: list[list[str]] = []

    def timed(artifacts: list[Path], target: Target) -> list[Timing]:
        few = ["MatMulNBits" in (path / "model.onnx").read_bytes().decode("latin-1") for path in artifacts]
        return [Timing.of([5.0 if one else 10.0] * 10) for one in few]

    def step(artifacts: list[Path], target: Target) -> list[Timing]:
        seen.append([path.relative_to(path.parents[1]).as_posix() for path in artifacts])
        return timed(artifacts, target)

    monkeypatch.setattr(outcome, "measure", timed)
    monkeypatch.setattr(worth, "measure", step)
    return seen


def plan_of(world: Path, *passes: Any, export: Any = EXPORT) -> dict[str, Any]:
    data = {"source": str(world / "reviews.txt")}
    return {"model": str(world / "my-encoder"), "data": data, "passes": list(passes), "export": export}


def test_a_step_that_pays_is_taken(world: Path, paper: list[list[str]], tmp_path: Path) -> None:
    asked = {**GPTQ, "keep_if": {"speedup": 1.9, "max_drop": 0.5}}
    (branch,) = check(compress(plan=plan_of(world, asked), out=tmp_path / "out").report).branches
    (step,) = branch.steps
    assert step.kept
    assert "2x as fast, 1.9x asked" in step.reason
    assert step.figures.model_extra["worth"]["precisions"] == ["float32", "weight_only"]
    assert [one.precision for one in branch.artifacts] == ["float32", "float32", "weight_only"]
    assert paper == [["without/1-onnx", "with/1-onnx", "with/2-onnx"]]


def test_a_step_that_does_not_pay_leaves_the_model_as_it_was(
    world: Path, paper: list[list[str]], tmp_path: Path
) -> None:
    asked = {**GPTQ, "keep_if": {"speedup": 3}}
    plan = plan_of(world, asked, "calibrate")
    (branch,) = check(compress(plan=plan, out=tmp_path / "out").report).branches
    dropped, after = branch.steps
    assert (dropped.kept, after.kept) == (False, True)
    assert dropped.reason == "2x as fast, 3x asked"
    assert dropped.figures.model_extra["loss"] > 0
    made, dense = (AutoModel.from_pretrained(path) for path in (tmp_path / "out" / "model", world / "my-encoder"))
    assert all(torch.equal(one, dense.state_dict()[name]) for name, one in made.state_dict().items())
    assert branch.refused == {"onnx-weight_only": "needs 'grid', which a step that was dropped would have given"}
    told = (tmp_path / "out" / "report.md").read_text()
    assert "gptq rejected; 2x as fast, 3x asked." in told
    assert "onnx-weight\\_only not made" in told
    again = compress(plan=plan, out=tmp_path / "out")
    assert again.report["branches"][0]["steps"][0]["kept"] is False
    assert len(paper) == 1  # nothing is measured twice


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([{"calibrate": None, "keep_if": {"speedpu": 1}}], "unknown option; expected one of speedup, max_drop"),
        (["calibrate", {"ziplm": {"speedups": [2, 3]}, "keep_if": {"speedup": 1}}], "makes one; expected none beside"),
        ([{"calibrate": None, "keep_if": {"speedup": 1}}, {"ziplm": {"speedups": [2]}}], "only where it is kept"),
        ([{"gradual": {"speedups": [2], "passes": ["ziplm"]}, "keep_if": {"speedup": 1}}], "beside a gradual step"),
    ],
)
def test_what_can_not_be_dropped_is_told_before(world: Path, passes: list, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        compress(plan=plan_of(world, *passes, export=["huggingface"]))


def test_a_plan_with_it_is_written_as_it_was_read(world: Path) -> None:
    tables = Tables(PASSES, EXPORTERS)
    plan = Plan.read(plan_of(world, {**GPTQ, "keep_if": {"speedup": 1.02, "max_drop": 0.01}}), tables)
    assert plan.check() == []
    assert Plan.read(plan.to_yaml(), tables).passes == plan.passes
    without = Plan.read(plan_of(world, GPTQ), tables)
    assert plan.passes[0].key_material() != without.passes[0].key_material()
