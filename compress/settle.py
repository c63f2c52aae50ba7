"""What becomes of a branch's artifacts: what their speed comes from, whether they pay, and which of several stays.

The speed-up of an artifact against the dense model in the target's runtime is the product of three that were measured:
the dense model in the artifact's runtime, the branch's model there against that, and the artifact against its model in
float32. Each runtime is timed in a process of its own, with the dense model beside the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from compress import store
from compress.contract import FLOAT
from compress.exports import Export
from compress.measure import Timing, apart, speedup
from compress.plan.steps import Named
from compress.progress import say
from compress.runner import Run
from compress.runtimes import Artifact
from compress.verdict import Fastest, KeepIf

Times = Mapping[str, Mapping[Path, Timing]]  # by runtime and artifact; that of the dense model is the first of each


def settle(
    run: Run, made: Sequence[Export], branch: Mapping[str, Any], times: Times, whole: Path
) -> list[dict[str, Any]]:
    """The rows of a branch's artifacts in the report, with their speed and verdicts; what doesn't pay is put aside.

    `whole` is the artifact of the branch's model in float32 for the target's runtime.
    """
    runtimes = [next((name for name, found in times.items() if one.path in found), None) for one in made]
    wholes = {run.plan.target.chosen: whole}
    for one, runtime in zip(made, runtimes, strict=True):
        if runtime and one.row["precision"] == FLOAT:
            wholes.setdefault(runtime, one.path)
    rows = []
    for one, runtime in zip(made, runtimes, strict=True):
        row = {**one.row, "kept": True, "reason": "", "runtime": runtime}
        row |= _speed(run, one, times, runtime, wholes) if runtime else {}
        if one.options.keep_if is not None:
            row["kept"], row["reason"] = _verdict(run, one.options.keep_if, row, branch)
        rows.append(row)
    for chooser in dict.fromkeys(one.chooser for one in made if one.chooser):
        _choose(run, chooser, [row for one, row in zip(made, rows, strict=True) if one.chooser == chooser], branch)
    for one, row in zip(made, rows, strict=True):
        _put(run, one, row)
    return rows


def _speed(run: Run, made: Export, times: Times, runtime: str, wholes: Mapping[str, Path]) -> dict[str, Any]:
    """The speed of an artifact against the dense model, and what it comes from as far as that was measured."""
    there = times[runtime]
    first, dense = (next(iter(times[name].values())) for name in (run.plan.target.chosen, runtime))
    timing = there[made.path]
    whole = timing if made.row["precision"] == FLOAT else there.get(wholes.get(runtime, Path()))
    value, low, high = speedup(dense, timing) if dense is first else apart(first, timing)
    factors = whole and {
        "runtime": first.milliseconds / dense.milliseconds,
        "structure": dense.milliseconds / whole.milliseconds,
        "precision": whole.milliseconds / timing.milliseconds,
    }
    return {
        "milliseconds": timing.milliseconds,
        "measured_speedup": value,
        "measured_low": low,
        "measured_high": high,
        "factors": factors,
    }


def _verdict(run: Run, asked: KeepIf, row: Mapping[str, Any], branch: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether an artifact pays against its model in float32, and why."""
    metric = next((name for name in run.task.metrics if name in branch["quality"]), run.task.metric)
    scores = branch["quality"].get(metric), row["quality"].get(metric)
    ratio = (row.get("factors") or {}).get("precision")
    return asked.verdict(ratio, metric, scores, run.task.lower_is_better)


def _choose(run: Run, chooser: Named, rows: Sequence[dict[str, Any]], branch: Mapping[str, Any]) -> None:
    """Keep one of several artifacts: the fastest of those that keep quality; float32 does by being the model."""
    asked = KeepIf(max_drop=cast(Fastest, chooser.do).max_drop)
    for row in rows:
        row["kept"], row["reason"] = (True, "") if row["precision"] == FLOAT else _verdict(run, asked, row, branch)
        if row["runtime"] is None:
            row["kept"], row["reason"] = False, "its runtime could not be timed"
    fit = [row for row in rows if row["kept"]]
    best = min(fit, key=lambda row: row["milliseconds"], default={})
    for row in fit:
        if row is best:
            told = f"; {row['reason']}" if row["reason"] else ""
            row["reason"] = f"the fastest of {len(rows)} tried{told}"
        else:
            row["kept"] = False
            row["reason"] = f"{row['milliseconds']:.3g} ms, where the fastest takes {best['milliseconds']:.3g} ms"


def _put(run: Run, made: Export, row: dict[str, Any]) -> None:
    """Let an artifact lie where its verdict says: at home, or aside in the run's cache."""
    place = made.home if row["kept"] else run.cache / "rejected" / made.memory.stem
    if made.path == place:
        return
    if not row["kept"]:
        say(f"{made.path} is put aside: {row['reason']}")
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made.path, place)
    row["path"] = str(place)
    store.write_json(made.memory, asdict(replace(Artifact.told(row), path=str(place))))
