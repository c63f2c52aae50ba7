"""Everything shown is run: README's blocks, the plans in configs/, and the tables made from results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from compress import latency
from compress.data import DataOptions
from compress.plan import Plan, Tables
from exporters import EXPORTERS
from passes import PASSES
from tests.world import make_world

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"<!-- (\w+) -->\n```(\w+)\n(.*?)```", re.DOTALL)
IDS = ["branches", "gradual", "precision", "qat", "losses", "cached", "sparse", "packed"]  # of README's plans
PLANS = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "compress" / "demo.yaml"]


def blocks(mark: str) -> list[str]:
    return [code for name, _, code in BLOCK.findall(README) if name == mark]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    make_world(folder, blocks=3)  # the first and the last stay where blocks are dropped
    return folder


def test_the_python_blocks_run_one_after_another(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(latency, "MOST_MEASURED", 5)  # each size is a graph to export; the promise is measured anyway
    python = [code for code in blocks("run") if "```" not in code]
    assert len(python) == 3
    shared: dict[str, object] = {}
    for code in python:
        exec(compile(code, "README.md", "exec"), shared)  # what README shows is what is tested
    report = shared["result"].report  # type: ignore[attr-defined]
    assert report["branches"][0]["promised_speedup"] == 1.5
    assert report["branches"][0]["artifacts"][1]["worst_error"] < 1e-3
    assert shared["hidden"].shape[::2] == (2, 32)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", blocks("plan"), ids=IDS)
def test_the_plan_is_fit_and_the_commands_about_it_run(text: str, world: Path) -> None:
    (world / "plan.yaml").write_text(text)
    for command in ("check plan.yaml", "explain plan.yaml", "explain plan.yaml --mermaid", "schema", "doctor"):
        words = [sys.executable, "-m", "compress.cli", *command.split()]
        done = subprocess.run(words, cwd=world, env=_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("text", blocks("plan"), ids=IDS)
def test_the_plan_runs(text: str, world: Path, tmp_path: Path) -> None:
    (world / "plan.yaml").write_text(text)
    words = [sys.executable, "-m", "compress.cli", "run", "plan.yaml", "--out", str(tmp_path / "out")]
    subprocess.run(words, cwd=world, env=_environment(), check=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    artifacts = [artifact for branch in report["branches"] for artifact in branch["artifacts"]]
    assert artifacts
    assert all(Path(artifact["path"], "config.json").exists() for artifact in artifacts)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_a_shipped_plan_can_be_read_and_its_order_holds(path: Path, world: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    plan = Plan.read(path, Tables(PASSES, EXPORTERS))
    local = plan.model_copy(update={"model": str(world / "my-encoder"), "data": DataOptions(), "out": None})
    assert local.check() == []


def test_the_figures_are_those_of_the_results() -> None:
    assert tables.PAGE.read_text() == tables.page()


def test_the_passes_of_readme_are_the_passes() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert set(listed) == set(PASSES)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
