"""What leaves a branch: its artifacts, each judged by itself where it is another model than the branch's.

The figures of a branch are its model's, in float32. An artifact of lower precision is another model: its quality is
taken through its own runtime. Where a plan leaves the choice, several are made, and what can't be made is told.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from compress import store
from compress.contract import FLOAT
from compress.errors import ExportError, TargetError
from compress.evaluate import evaluate
from compress.evaluate.opened import Opened
from compress.plan import Node
from compress.plan.steps import Named
from compress.progress import say
from compress.runner import Run, digest, remembered
from compress.runtimes import Artifact, open_artifact, runtime_of, takes
from compress.state import State
from compress.verdict import Fastest


@dataclass(frozen=True)
class Export:
    """An artifact that was made: its exporter's options, where it is remembered, and its row in the report.

    It is to lie at `home`; one of several was made for the `chooser` in the plan.
    """

    options: Any
    memory: Path
    home: Path
    row: dict[str, Any]
    chooser: Named | None = None

    @property
    def path(self) -> Path:
        """Where the artifact lies."""
        return Path(self.row["path"])


def export(
    run: Run, leaf: Node, state: State, home: Path, card: Mapping[str, Any]
) -> tuple[list[Export], dict[str, str]]:
    """Run the plan's exporters, but for what is there already, and judge what isn't float32 any more.

    Also told is what could not be made, and why: for a step that was dropped, or where several were to choose from.
    """
    made: list[Export] = []
    refused: dict[str, str] = {}
    for exporter, place in zip(run.plan.export, places([one.do for one in run.plan.export]), strict=True):
        if not isinstance(exporter.do, Fastest):
            if lacking := {fact.name for fact in cast(Any, exporter.do).requires} - state.facts.keys():
                refused[place] = f"needs '{min(lacking)}', which a step that was dropped would have given"
                continue
            made.append(_export(run, leaf, state, exporter, home / place, card))
            continue
        candidates: Sequence[Any] = exporter.do.candidates(state)
        for one, inner in zip(candidates, places(candidates), strict=True):
            candidate = Named(name=one.kind, do=one)
            try:
                made.append(_export(run, leaf, state, candidate, home / place / inner, card, exporter))
            except (ExportError, TargetError) as error:
                refused[inner] = str(error)
    return made, refused


def _export(
    run: Run,
    leaf: Node,
    state: State,
    exporter: Named,
    folder: Path,
    card: Mapping[str, Any],
    chooser: Named | None = None,
) -> Export:
    """Run one exporter, or find what it left; of those to be chosen from, refuse what can't be timed on the target."""
    options, chosen = cast(Any, exporter.do), [chooser.key_material()] if chooser else []
    memory = run.cache / "artifacts" / f"{digest([run.key(leaf), exporter.key_material(), *chosen, str(folder)])}.json"
    if memory.exists() and not Artifact(**remembered(memory, dict)).intact():
        memory.unlink()
    if not memory.exists():
        say(f"exporting {exporter.name} to {folder}")
        artifact = options.run(state, folder, card)
        if chooser and not comparable(run, folder):
            shutil.rmtree(folder)
            raise ExportError(f"{exporter.name}: graphs have no key-value cache, which the target's requests are for")
        store.write_json(memory, asdict(artifact))
    row = remembered(memory, dict)
    scores = {key: card[key] for key in ("quality", "quality_interval")}
    row |= scores if row["precision"] == FLOAT else _judged(run, row, state)
    return Export(options, memory, folder, row, chooser)


def places(exporters: Sequence[Any]) -> list[str]:
    """A folder for each exporter: its own, numbered where several would share it."""
    met: Counter[str] = Counter()
    found = []
    for exporter in exporters:
        folder = exporter.folder
        met[folder] += 1
        found.append(folder if met[folder] == 1 else f"{folder}-{met[folder]}")
    return found


def on_target(run: Run, path: Path) -> bool:
    """Whether the target's runtime takes an artifact and can do with it what the target asks."""
    return takes(run.plan.target, path, run.task.generates)


def comparable(run: Run, path: Path) -> bool:
    """Whether an artifact can be timed beside others: one without its cache is none for those that have it."""
    return not run.task.generates or runtime_of(path).generates(path)


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
