"""What leaves a branch: its artifacts, each with its own speed and quality, and whether it is worth having.

The figures of a branch are its model's, in float32. An artifact of lower precision is another model: its quality is
taken through its own runtime, and its speed in the same rounds as the others'. One that was asked to pay, and doesn't,
is put aside in the run's cache; its figures stay in the report.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from compress import store
from compress.contract import FLOAT
from compress.evaluate import evaluate
from compress.evaluate.opened import Opened
from compress.measure import Timing, speedup
from compress.plan import Node
from compress.progress import say
from compress.runner import Run, digest, remembered
from compress.runtimes import RUNTIMES, Artifact, open_artifact
from compress.state import State


@dataclass(frozen=True)
class Export:
    """An artifact that was made: its exporter's options, where it is remembered, and its row in the report."""

    options: Any
    memory: Path
    row: dict[str, Any]

    @property
    def path(self) -> Path:
        """Where the artifact lies."""
        return Path(self.row["path"])


def export(run: Run, leaf: Node, state: State, home: Path, card: Mapping[str, Any]) -> list[Export]:
    """Run the plan's exporters, but for what is there already, and judge what isn't float32 any more."""
    made = []
    for exporter, place in zip(run.plan.export, places(run.plan.export), strict=True):
        folder, options = home / place, cast(Any, exporter.do)
        memory = run.cache / "artifacts" / f"{digest([run.key(leaf), exporter.key_material(), str(folder)])}.json"
        if memory.exists() and not Artifact(**remembered(memory, dict)).intact():
            memory.unlink()
        if not memory.exists():
            say(f"exporting {exporter.name} to {folder}")
            store.write_json(memory, asdict(options.run(state, folder, card)))
        row = remembered(memory, dict)
        scores = {key: card[key] for key in ("quality", "quality_interval")}
        made.append(Export(options, memory, row | (scores if row["precision"] == FLOAT else _judged(run, row, state))))
    return made


def places(exporters: Sequence[Any]) -> list[str]:
    """A folder for each exporter: its own, numbered where several would share it."""
    met: Counter[str] = Counter()
    found = []
    for exporter in exporters:
        folder = exporter.do.folder
        met[folder] += 1
        found.append(folder if met[folder] == 1 else f"{folder}-{met[folder]}")
    return found


def on_target(run: Run, path: Path) -> bool:
    """Whether the target's runtime takes an artifact; one without its cache can't be compared with one that has it."""
    runtime = RUNTIMES[run.plan.target.chosen]
    return runtime.holds(path) and (runtime.generates(path) or not run.task.generates)


def settle(
    run: Run, made: Export, branch: Mapping[str, Any], times: Mapping[Path, Timing], whole: Path
) -> dict[str, Any]:
    """The row of an artifact in the report with its speed and its verdict; one that doesn't pay is put aside.

    `whole` is the artifact of the branch's model in float32. The dense model's is the first in `times`.
    """
    row, timing = {**made.row, "kept": True, "reason": ""}, times.get(made.path)
    if timing is not None:
        value, low, high = speedup(next(iter(times.values())), timing)
        row |= {"milliseconds": timing.milliseconds}
        row |= {"measured_speedup": value, "measured_low": low, "measured_high": high}
    if made.options.keep_if is None:
        return row
    metric = next((name for name in run.task.metrics if name in branch["quality"]), run.task.metric)
    scores = branch["quality"].get(metric), row["quality"].get(metric)
    ratio = None if timing is None else speedup(times[whole], timing).value
    row["kept"], row["reason"] = made.options.keep_if.verdict(ratio, metric, scores, run.task.lower_is_better)
    aside = run.cache / "rejected" / made.memory.stem
    if not row["kept"] and made.path != aside:
        say(f"{made.path} is put aside: {row['reason']}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made.path, aside)
        row["path"] = str(aside)
        store.write_json(made.memory, asdict(replace(Artifact.told(row), path=str(aside))))
    return row


def quality(folder: Path, model: Any, state: State, what: str = "the model") -> dict[str, Any]:
    """Scores of a model, fidelity to the state's teacher among them, values and intervals apart as the report has them.

    Those of the test split are the `quality`, those of another domain, where the data has one, the `quality_other`.
    """
    found: dict[str, Any] = {}
    for split, key in (("test", "quality"), ("other", "quality_other")):
        if split not in state.data.splits:
            continue

        def judge(split: str = split) -> dict[str, Any]:
            say(f"judging quality of {what} on the {split} split")
            scores = evaluate(model, state.data, state.task, split=split, teacher=state.teacher)
            return {metric: asdict(score) for metric, score in scores.items()}

        scores = remembered(folder / f"quality_{split}.json", judge)
        found[key] = {metric: score["value"] for metric, score in scores.items()}
        found[f"{key}_interval"] = {metric: [score["low"], score["high"]] for metric, score in scores.items()}
    return found


def _judged(run: Run, row: Mapping[str, Any], state: State) -> dict[str, Any]:
    """Scores of an artifact through its own runtime; none where it takes but one shape."""
    session = open_artifact(Path(row["path"]), run.plan.target)
    if session.fixed:
        return {"quality": {}, "quality_interval": {}}
    stored = run.cache / "quality" / digest([run.root_key, row["sha256"], state.dense.source])
    return quality(stored, Opened(session, state.model.config), state, row["path"])
