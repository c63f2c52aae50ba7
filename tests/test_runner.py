"""The runner: content-addressed nodes, resume after a kill at any moment, forks, and an out folder it may use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from compress.contract import STATISTICS, Part, Pass
from compress.errors import CompressError, ReachError
from compress.plan import Plan, Tables
from compress.runner import Run, prepare
from compress.state import State
from tests.world import make_world

RAN: list[str] = []


class Learn(Pass):
    """Gives statistics."""

    provides: ClassVar = frozenset({STATISTICS})

    def run(self, state: State) -> Iterator[State]:
        RAN.append("learn")
        state.give(STATISTICS, {"mean": torch.ones(3), "count": 7})
        yield state


class Shift(Pass):
    """Adds to every weight, in one branch per amount."""

    touches: ClassVar = Part.VALUES
    by: tuple[float, ...] = (1.0,)

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(f"{by:g}" for by in self.by) if len(self.by) > 1 else ("",)

    def run(self, state: State) -> Iterator[State]:
        for by in self.by:
            RAN.append(f"shift {by:g}")
            branch = state.branch()
            with torch.no_grad():
                words = branch.model.embeddings.word_embeddings
                words.weight = torch.nn.Parameter(words.weight + by)  # branches share the memory of their weights
            branch.figures["by"] = by
            yield branch


class Cut(Pass):
    """Cuts columns of the first layer."""

    touches: ClassVar = Part.SHAPE | Part.VALUES
    keep: int = 8

    def run(self, state: State) -> Iterator[State]:
        RAN.append("cut")
        state.cut("encoder.layer.0.columns", range(self.keep))
        yield state


class Speed(Pass):
    """Cuts columns to a share, as a pruning pass does for a speed-up; of more than eight there is none."""

    touches: ClassVar = Part.SHAPE | Part.VALUES
    requires: ClassVar = frozenset({STATISTICS})
    speedups: tuple[float, ...]

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(f"{one:g}x" for one in self.speedups) if len(self.speedups) > 1 else ("",)

    def run(self, state: State) -> Iterator[State | ReachError]:
        for speedup in self.speedups:
            RAN.append(f"speed {speedup:g}")
            if speedup > 8:
                yield ReachError(f"{speedup:g}x is out of reach", 8.0)
                continue
            branch = state.branch()
            branch.cut("encoder.layer.0.columns", range(int(1024 / speedup)))
            branch.figures = {"promised": speedup}
            yield branch


class Break(Pass):
    """Stops in the middle."""

    def run(self, state: State) -> Iterator[State]:
        (state.workshop.step / "checkpoint").write_text("half way")
        raise KeyboardInterrupt
        yield state


TOYS = Tables({"learn": Learn, "shift": Shift, "cut": Cut, "speed": Speed, "break": Break}, {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path):
    def start(*passes: object) -> tuple[Run, list]:
        RAN.clear()
        values = {"model": str(world / "my-encoder"), "data": {"source": str(world / "reviews.txt")}}
        plan = Plan.read({**values, "passes": list(passes), "export": []}, TOYS)
        made = Run(plan, prepare(tmp_path / "out", fresh=False))
        return made, made.go()

    return start


def word(made: Run, node: object) -> float:
    return float(made.state(node).model.embeddings.word_embeddings.weight.detach()[5, 5])


def test_nothing_runs_twice(run) -> None:
    run("learn", "shift")
    assert RAN == ["learn", "shift 1"]
    run("learn", "shift")
    assert RAN == []


def test_editing_the_last_step_runs_only_that_step(run) -> None:
    run("learn", {"shift": {"by": [1]}})
    run("learn", {"shift": {"by": [2]}})
    assert RAN == ["shift 2"]


def test_editing_the_first_step_runs_all_that_hangs_on_it(run) -> None:
    run({"shift": {"by": [1]}}, "cut")
    run({"shift": {"by": [2]}}, "cut")
    assert RAN == ["shift 2", "cut"]


def test_branches_have_their_own_tails(run) -> None:
    made, leaves = run({"shift": {"by": [1, 3]}}, {"shift": {"by": [10]}})
    assert [leaf.branch for leaf in leaves] == ["1", "3"]
    assert word(made, leaves[1]) - word(made, leaves[0]) == pytest.approx(2, abs=1e-5)


def test_forks_start_from_the_step_they_name(run) -> None:
    steps = [{"shift": {"by": [1]}, "id": "one"}, {"shift": {"by": [2]}, "after": "one"}, {"cut": None, "after": "one"}]
    made, leaves = run(*steps)
    assert len(leaves) == 2
    assert word(made, leaves[0]) - word(made, leaves[1]) == pytest.approx(2, abs=1e-5)


def gradual(*speedups: float, **more: str) -> dict:
    return {"gradual": {"speedups": speedups, "passes": ["learn", "speed", {"shift": {"by": [1]}}], **more}}


def test_a_gradual_step_goes_on_from_model_to_model(run) -> None:
    made, family = run({"shift": {"by": [5]}}, gradual(2, 4))
    assert RAN == ["shift 5", "learn", "speed 2", "shift 1", "learn", "speed 4", "shift 1"]
    assert [leaf.branch for leaf in family] == ["2x", "4x"]
    states = [made.state(leaf) for leaf in family]
    assert [state.layout.axis("encoder.layer.0.columns").units for state in states] == [512, 256]
    assert word(made, family[1]) - word(made, family[0]) == pytest.approx(1, abs=1e-5)
    assert all(state.dense.source == states[0].dense.source for state in states)
    made, longer = run({"shift": {"by": [5]}}, gradual(2, 4, 8))
    assert RAN == ["learn", "speed 8", "shift 1"]
    assert [made.key(leaf) for leaf in longer[:2]] == [made.key(leaf) for leaf in family]


def test_a_step_after_a_gradual_one_runs_for_each_of_its_models(run) -> None:
    made, each = run(gradual(2, 4), {"shift": {"by": [10]}})
    assert RAN.count("shift 10") == 2
    assert [leaf.branch for leaf in each] == ["2x", "4x"]
    assert [made.state(leaf).layout.axis("encoder.layer.0.columns").units for leaf in each] == [512, 256]


def test_the_last_model_of_a_gradual_step_may_be_all_that_is_delivered(run) -> None:
    run(gradual(2, 4))
    made, (leaf,) = run(gradual(2, 4, deliver="last"), {"shift": {"by": [10]}})
    assert RAN == ["shift 10"]  # the family is there already
    assert leaf.branch == ""
    assert made.state(leaf).layout.axis("encoder.layer.0.columns").units == 256
    _, (alone,) = run(gradual(2, 4, deliver="last"))
    assert RAN == []
    assert leaf.parents == (alone,)


def test_what_is_out_of_reach_is_left_out_with_all_that_follows_and_the_others_are_made(run) -> None:
    steps = "learn", {"speed": {"speedups": [2, 100, 4]}}, {"shift": {"by": [1]}}
    made, leaves = run(*steps)
    assert RAN == ["learn", "speed 2", "speed 100", "speed 4", "shift 1", "shift 1"]
    assert [leaf.branch for leaf in leaves] == ["2x", "4x"]
    again, _ = run(*steps)
    assert RAN == []
    for one in (made, again):
        ((name, missed),) = one.out_of_reach.items()
        assert (name, str(missed), missed.fastest) == ("100x", "100x is out of reach", 8.0)


def test_a_gradual_step_ends_where_the_next_target_is_out_of_reach(run) -> None:
    made, leaves = run(gradual(2, 100, 200), {"shift": {"by": [3]}})
    assert RAN == ["learn", "speed 2", "shift 1", "learn", "speed 100", "shift 3"]
    assert [leaf.branch for leaf in leaves] == ["2x"]
    assert {name: str(missed) for name, missed in made.out_of_reach.items()} == {
        "100x": "100x is out of reach",
        "200x": "100x is out of reach",
    }


def test_a_fork_goes_on_where_another_is_out_of_reach(run) -> None:
    fork = {"speed": {"speedups": [100]}, "after": "learn"}, {"speed": {"speedups": [2]}, "id": "two", "after": "learn"}
    made, (leaf,) = run("learn", *fork)
    assert leaf.branch == "two"
    assert made.out_of_reach.keys() == {"speed"}


def test_nothing_in_reach_is_an_error_before_the_long_steps(run) -> None:
    for _ in range(2):
        with pytest.raises(ReachError, match=r"^100x is out of reach; 200x is out of reach$"):
            run("learn", {"speed": {"speedups": [100, 200]}}, "shift")
        assert "shift 1" not in RAN


def test_facts_are_stored_and_go_stale(run) -> None:
    made, (leaf,) = run("learn")
    facts = made.state(leaf).facts
    assert facts["statistics"]["count"] == 7
    assert torch.equal(facts["statistics"]["mean"], torch.ones(3))
    made, (leaf,) = run("learn", "shift")
    assert made.state(leaf).facts == {}


def test_a_cut_is_remembered_with_the_units_of_the_dense_model(run) -> None:
    made, (leaf,) = run("cut", {"cut": {"keep": 5}})
    state = made.state(leaf)
    assert state.kept == {"encoder.layer.0.columns": [0, 1, 2, 3, 4]}
    assert state.layout.axis("encoder.layer.0.columns").units == 5


def test_units_are_named_as_in_the_dense_model_after_blocks_were_dropped(run) -> None:
    made, (leaf,) = run("learn")
    state = made.state(leaf)
    state.layout = state.layout.drop(state.model, "encoder.layer", [1])
    state.cut("encoder.layer.0.heads", [1, 3])
    assert state.kept == {"encoder.layer.1.heads": [1, 3]}


def test_a_broken_step_leaves_the_finished_ones_and_its_own_checkpoints(run) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("learn", "break")
    made, _ = run("learn")
    assert RAN == []
    assert [path.read_text() for path in made.cache.glob("work/*/checkpoint")] == ["half way"]
    assert not list(made.cache.rglob("*.unfinished"))


def test_another_model_is_another_key(run, world: Path, tmp_path: Path) -> None:
    made, (leaf,) = run("learn")
    other = tmp_path / "other"
    state = made.state(leaf)
    with torch.no_grad():
        state.model.embeddings.word_embeddings.weight += 1
    state.model.save_pretrained(other)
    state.tokenizer.save_pretrained(other)
    plan = made.plan.model_copy(update={"model": str(other)})
    assert Run(plan, made.cache).key(leaf) != made.key(leaf)


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CompressError, match="not empty and was not made by hf-compress"):
        prepare(tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").exists()


def test_fresh_forgets_everything(run, tmp_path: Path) -> None:
    run("learn")
    prepare(tmp_path / "out", fresh=True)
    run("learn")
    assert RAN == ["learn"]


KILLED = """
import sys
from compress.api import compress
compress(plan=sys.argv[1], out=sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    """SIGKILL between steps and inside training; then the run finishes as if nothing had been."""
    plan = {
        "model": str(world / "my-encoder"),
        "data": {"source": str(world / "reviews.txt")},
        "passes": ["calibrate", {"distill": {"steps": 120, "checkpoint_every": 10, "batch_size": 4}}],
        "export": ["huggingface"],
        "target": {"runtime": "torch"},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(plan))
    weights = []
    for out, kills in ((tmp_path / "straight", ()), (tmp_path / "killed", ("nodes/*/state.json", "work/*/training.*"))):
        command = [sys.executable, "-c", KILLED, str(path), str(out)]
        for moment in kills:
            process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
            while not list((out / ".cache").glob(moment)) and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        weights.append((out / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
