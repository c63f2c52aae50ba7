"""What a finished branch is worth: its artifacts, its measured speed, its quality before and after recovery.

Everything here reads stored nodes and artifacts on disk, and is itself stored, so that a second run of the same plan
measures nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compress import store
from compress.contract import FLOAT, MASKS, Part
from compress.errors import CompressError
from compress.evaluate import layer_similarity
from compress.exports import Export, export, on_target, quality
from compress.families import layout_of
from compress.measure import Timing, measure, speedup
from compress.memory import stored_bytes, stored_parameters
from compress.plan import Node
from compress.progress import say
from compress.runner import Run, digest, remembered
from compress.runtimes import runtime_of
from compress.runtimes.base import digest_of
from compress.settle import settle
from compress.state import State, dense_name
from compress.target import Target, machine
from compress.tasks import Task

BEFORE = "quality_before_recovery"


def outcome(run: Run, leaves: Sequence[Node], out: Path, started: float) -> dict[str, Any]:
    """Export, measure and judge every branch; return the report, with what is out of reach."""
    branches, made, wholes = [], [], []
    for leaf in leaves:
        state = run.state(leaf)
        branches.append(_branch(run, leaf, state))
        exports, branches[-1]["refused"] = export(run, leaf, state, out / leaf.branch, branches[-1])
        made.append(exports)
        wholes.append(_whole(run, leaf, state, made[-1]))
    baseline = run.state(leaves[0])  # where branches had dense models of their own, the first one's is the baseline
    times = _timings(run, baseline, wholes, branches, made)
    here = times[run.plan.target.chosen]
    first = next(iter(here.values()))
    for branch, exports, whole in zip(branches, made, wholes, strict=True):
        ratio = speedup(first, here[whole])
        promised = branch["promised_speedup"]
        branch |= {
            "measured_speedup": ratio.value,
            "measured_low": ratio.low,
            "measured_high": ratio.high,
            "met": None if promised is None else ratio.value >= promised,
            **_told(here[whole], run.plan.target),
            "artifacts": settle(run, exports, branch, times, whole),
        }
    dense = baseline.dense.model
    stored = run.cache / "quality" / digest([run.root_key, baseline.dense.source])
    scores = quality(stored, dense, baseline.as_dense(), "the dense model")
    return {
        "schema": 1,
        "headline": next((metric for metric in run.task.metrics if metric in scores["quality"]), None),
        "environment": {**machine(), "target": run.plan.target.fingerprint()["target"]},
        "plan": run.plan.to_yaml(),
        "task": run.task.name,
        "seconds": round(time.monotonic() - started, 1),
        "baseline": {
            **_size(dense),
            **_told(first, run.plan.target),
            **scores,
        },
        "branches": branches,
        "out_of_reach": [
            {"name": name, "reason": str(missed), "fastest": missed.fastest}
            for name, missed in run.out_of_reach.items()
        ],
    }


def _branch(run: Run, leaf: Node, state: State) -> dict[str, Any]:
    """Everything about one leaf but its artifacts and its speed."""
    chain = [leaf]
    while chain[0].parents:
        chain.insert(0, chain[0].parents[0])
    rows = [store.row_of(run.folder(node)) for node in chain]
    scores = quality(run.folder(leaf), state.model, state)
    before = {name.replace("quality", BEFORE): found for name, found in scores.items()}
    pruned_by = [node for node in chain if Part.SHAPE in (do := node.step.do).touches or MASKS in do.provides]
    if pruned_by and pruned_by[-1] is not leaf:
        earlier = run.state(pruned_by[-1])
        found = quality(run.folder(pruned_by[-1]), earlier.model, earlier)
        before = {name.replace("quality", BEFORE): one for name, one in found.items()}
    taken = [row["figures"] for row in rows if row["kept"]]
    pruned: dict[str, Any] = next((figures for figures in taken[::-1] if "promised" in figures), {})
    return {
        "name": leaf.branch or "compressed",
        "promised_speedup": pruned.get("promised"),
        "measured_speedup": pruned.get("measured"),  # for the model card; that of the artifacts takes its place
        **_size(state.model),
        **before,
        **scores,
        "layers": remembered(run.folder(leaf) / "layers.json", lambda: layer_similarity(state)),
        "warnings": overfitted(run.task, {**before, **scores}),
        "steps": rows,
        "axes": _axes(state),
    }


def _whole(run: Run, leaf: Node, state: State, made: Sequence[Export]) -> Path:
    """The branch's model in float32 for the target's runtime: as it was exported, or built only to be measured."""
    for one in made:
        if one.row["precision"] == FLOAT and on_target(run, one.path):
            return one.path
    folder = run.cache / "built" / run.key(leaf)
    if not folder.exists():
        state.build(state.model, folder)
    return folder


def _timings(
    run: Run, baseline: State, wholes: Sequence[Path], branches: Sequence[dict[str, Any]], made: Sequence[list[Export]]
) -> dict[str, dict[Path, Timing]]:
    """Times by runtime, each runtime's artifacts in one process, the dense model first, the target's runtime first.

    Runtimes other than the target's are timed for what is to be chosen from alone; one that can't be is told.
    """
    target = run.plan.target
    paths = {target.chosen: [*wholes, *(one.path for exports in made for one in exports if on_target(run, one.path))]}
    for one in (one for exports in made for one in exports if one.chooser):
        if (name := runtime_of(one.path).name) != target.chosen:
            paths.setdefault(name, []).append(one.path)
    times = {}
    for name, artifacts in paths.items():
        there = target.model_copy(update={"runtime": name})
        try:
            dense = replace(baseline, target=there).dense_artifact()
            times[name] = _timed(run, there, [dense, *dict.fromkeys(artifacts)])
        except CompressError as error:
            if name == target.chosen:
                raise
            for branch in branches:
                branch["refused"][name] = str(error)
    return times


def _timed(run: Run, target: Target, artifacts: Sequence[Path]) -> dict[Path, Timing]:
    """Time artifacts of one runtime in turn, in one process."""
    digests = [digest_of(path) for path in artifacts]
    stored = run.cache / "timings" / f"{digest([target.fingerprint(), digests])}.json"

    def time_them() -> list[dict[str, Any]]:
        say(f"measuring {len(artifacts)} artifacts on {target.chosen}")
        return [asdict(timing) for timing in measure(artifacts, target)]

    found = [Timing(**timing) for timing in remembered(stored, time_them)]
    return dict(zip(artifacts, found, strict=True))


def _told(timing: Timing, target: Target) -> dict[str, Any]:
    """A timing as the report keeps it, without the time of every round."""
    rest: dict[str, Any] = {"low": timing.low, "high": timing.high, "rounds": len(timing.samples)}
    rest |= {"quantised": timing.quantised, "waited": timing.waited, "crowded": timing.crowded}
    rate = target.tokens_per_second(timing.milliseconds)
    return {"milliseconds": timing.milliseconds, "tokens_per_second": rate, "timing": rest}


def _size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters, zeros of packed layers left out, and the bytes that they take, indices and all."""
    return {"parameters": stored_parameters(model), "bytes": stored_bytes(model)}


def overfitted(task: Task, scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence where recovery won on the test split and lost on the other domain, by the task's headline score.

    What was there before must lie outside of the interval of what is there after.
    """
    metric = next((name for name in task.metrics if name in scores["quality"]), None)
    if metric is None or "quality_other" not in scores:
        return []
    before, after = ([scores[f"{name}{of}"][metric] for of in ("", "_other")] for name in (BEFORE, "quality"))
    sign = -1 if task.lower_is_better else 1
    low, high = scores["quality_other_interval"][metric]
    if sign * (after[0] - before[0]) > 0 > sign * (after[1] - before[1]) and not low <= before[1] <= high:
        told = (
            f"recovery took {metric} on the test split from {before[0]:.4g} to {after[0]:.4g} and on the other domain"
        )
        return [f"{told} from {before[1]:.4g} to {after[1]:.4g}: it over-fits to its corpus."]
    return []


def _axes(state: State) -> list[dict[str, Any]]:
    """Every axis of the dense model and which of its units survived; none where its block was dropped."""
    dense = layout_of(state.dense.model)
    present = {dense_name(name, state.model) for name in state.layout.axes}
    return [
        {
            "name": axis.name,
            "kind": axis.kind,
            "block": axis.block,
            "dense": axis.units,
            "kept": state.kept.get(axis.name, list(range(axis.units))) if axis.name in present else [],
        }
        for axis in dense.axes.values()
    ]
