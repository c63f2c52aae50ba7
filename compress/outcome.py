"""What a finished branch is worth: its artifacts, its measured speed, its quality before and after recovery.

Everything here reads stored nodes and artifacts on disk, and is itself stored, so that a second run of the same plan
measures nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compress import store
from compress.contract import Part
from compress.evaluate import evaluate, layer_similarity
from compress.families import layout_of
from compress.measure import Timing, measure, speedup
from compress.plan import Node
from compress.progress import say
from compress.runner import Run, digest, remembered
from compress.runtimes import RUNTIMES, Artifact
from compress.runtimes.base import digest_of
from compress.state import State, dense_name
from compress.target import Target, machine
from compress.tasks import Task

BEFORE = "quality_before_recovery"


def outcome(run: Run, leaves: Sequence[Node], out: Path, started: float) -> dict[str, Any]:
    """Export, measure and judge every branch; return the report."""
    branches, artifacts = [], []
    for leaf in leaves:
        state = run.state(leaf)
        branches.append(_branch(run, leaf, state, out))
        artifacts.append(_measured(run, leaf, state, branches[-1]))
    baseline = run.state(leaves[0])  # where branches had dense models of their own, the first one's is the baseline
    timings = _timings(run, [baseline.dense_artifact(), *artifacts])
    for branch, timing in zip(branches, timings[1:], strict=True):
        ratio = speedup(timings[0], timing)
        promised = branch["promised_speedup"]
        branch |= {
            "measured_speedup": ratio.value,
            "measured_low": ratio.low,
            "measured_high": ratio.high,
            "met": None if promised is None else ratio.value >= promised,
            **_told(timing, run.plan.target),
        }
    dense = baseline.dense.model
    stored = run.cache / "quality" / digest([run.root_key, baseline.dense.source])
    return {
        "schema": 1,
        "environment": {**machine(), "target": run.plan.target.fingerprint()["target"]},
        "plan": run.plan.to_yaml(),
        "task": run.task.name,
        "seconds": round(time.monotonic() - started, 1),
        "baseline": {
            **_size(dense),
            **_told(timings[0], run.plan.target),
            **_quality(stored, baseline.as_dense(), "quality"),
        },
        "branches": branches,
    }


def _branch(run: Run, leaf: Node, state: State, out: Path) -> dict[str, Any]:
    """Everything about one leaf but its speed."""
    chain = [leaf]
    while chain[0].parents:
        chain.insert(0, chain[0].parents[0])
    rows = [store.row_of(run.folder(node)) for node in chain]
    quality = _quality(run.folder(leaf), state, "quality")
    before = {name.replace("quality", BEFORE): scores for name, scores in quality.items()}
    shaped = [node for node in chain if Part.SHAPE in node.step.do.touches]
    if shaped and shaped[-1] is not leaf:
        before = _quality(run.folder(shaped[-1]), run.state(shaped[-1]), BEFORE)
    pruned: dict[str, Any] = next((row["figures"] for row in rows[::-1] if "promised" in row["figures"]), {})
    branch: dict[str, Any] = {
        "name": leaf.branch or "compressed",
        "promised_speedup": pruned.get("promised"),
        "measured_speedup": pruned.get("measured"),  # for the model card; that of the artifacts takes its place
        **_size(state.model),
        **before,
        **quality,
        "layers": remembered(run.folder(leaf) / "layers.json", lambda: layer_similarity(state)),
        "warnings": overfitted(run.task, {**before, **quality}),
        "steps": rows,
        "axes": _axes(state),
    }
    home = out / leaf.branch if leaf.branch else out
    branch["artifacts"] = [_export(run, leaf, exporter, state, home, branch) for exporter in run.plan.export]
    return branch


def _export(run: Run, leaf: Node, exporter: Any, state: State, home: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Run one exporter, unless the very artifact is there already."""
    made = run.cache / "artifacts" / f"{digest([run.key(leaf), exporter.key_material(), str(home)])}.json"
    if made.exists():
        found = Artifact(**remembered(made, dict))
        if found.intact():
            return asdict(found)
        made.unlink()
    say(f"exporting {exporter.name} to {home}")
    return remembered(made, lambda: asdict(exporter.do.run(state, home / exporter.do.folder, card)))


def _measured(run: Run, leaf: Node, state: State, branch: Mapping[str, Any]) -> Path:
    """The branch's artifact for the target's runtime: the exported one, or one built only to be measured.

    A decoder exported without its cache can't be compared with the dense one, which has it.
    """
    runtime = RUNTIMES[run.plan.target.chosen]
    for artifact in branch["artifacts"]:
        path = Path(artifact["path"])
        if runtime.holds(path) and (runtime.generates(path) or not run.task.generates):
            return path
    folder = run.cache / "built" / run.key(leaf)
    if not folder.exists():
        state.build(state.model, folder)
    return folder


def _timings(run: Run, artifacts: Sequence[Path]) -> list[Timing]:
    """Time artifacts, the dense one first, in turn, in one process of the target's runtime."""
    digests = [digest_of(path) for path in artifacts]
    stored = run.cache / "timings" / f"{digest([run.plan.target.fingerprint(), digests])}.json"

    def time_them() -> list[dict[str, Any]]:
        say(f"measuring {len(artifacts)} artifacts on {run.plan.target.chosen}")
        return [asdict(timing) for timing in measure(artifacts, run.plan.target)]

    return [Timing(**timing) for timing in remembered(stored, time_them)]


def _told(timing: Timing, target: Target) -> dict[str, Any]:
    """A timing as the report keeps it, without the time of every round."""
    rest = {"low": timing.low, "high": timing.high, "rounds": len(timing.samples), "quantised": timing.quantised}
    rate = target.tokens_per_second(timing.milliseconds)
    return {"milliseconds": timing.milliseconds, "tokens_per_second": rate, "timing": rest}


def _size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters, and the bytes that they take."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(one.numel() for one in parameters),
        "bytes": sum(one.numel() * one.element_size() for one in parameters),
    }


def _quality(folder: Path, state: State, name: str) -> dict[str, Any]:
    """Scores of a state's model, fidelity to its teacher among them, values and intervals apart as the report has them.

    Those of the test split under `name`, those of another domain, where the data has one, under `name`_other.
    """
    found: dict[str, Any] = {}
    for split, key in (("test", name), ("other", f"{name}_other")):
        if split not in state.data.splits:
            continue

        def judge(split: str = split) -> dict[str, Any]:
            say(f"judging quality on the {split} split")
            scores = evaluate(state.model, state.data, state.task, split=split, teacher=state.teacher)
            return {metric: asdict(score) for metric, score in scores.items()}

        scores = remembered(folder / f"quality_{split}.json", judge)
        found[key] = {metric: score["value"] for metric, score in scores.items()}
        found[f"{key}_interval"] = {metric: [score["low"], score["high"]] for metric, score in scores.items()}
    return found


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
