"""What a step is worth on the target: the artifacts that its model would leave as, beside those of the model before it.

The plan's exporters for the target's runtime write both models, and the fastest artifact of each is compared: few bits
make nothing faster before an exporter stores them, nor does a model that quantizes better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compress.contract import FLOAT
from compress.errors import ExportError
from compress.evaluate import evaluate, headline
from compress.evaluate.opened import Opened
from compress.measure import measure, speedup
from compress.progress import say
from compress.runtimes import Artifact, open_artifact, takes
from compress.state import State
from compress.verdict import Fastest

SPLIT = "validation"  # the test split judges what leaves, and chooses nothing before


class Worth(NamedTuple):
    """How many times as fast a step makes what leaves, and the headline score without it and with it."""

    ratio: float
    metric: str
    scores: tuple[float, float]
    precisions: tuple[str, str]


def worth(exporters: Sequence[Any], before: State, after: State, folder: Path) -> Worth:
    """Write both models into `folder`, time all that they leave as in one process, and judge the fastest of each."""
    target = after.target
    say(f"measuring on {target.chosen} what the step is worth")
    sides = [
        list(_artifacts(exporters, state, folder / name)) for name, state in (("without", before), ("with", after))
    ]
    timings = measure([Path(one.path) for side in sides for one in side], target)
    times = [timings[: len(sides[0])], timings[len(sides[0]) :]]
    fastest, scores = [], []
    for state, side, timed in zip((before, after), sides, times, strict=True):
        best = min(range(len(side)), key=lambda index: timed[index].milliseconds)
        fastest.append((side[best], timed[best]))
        scores.append(_score(state, side[best]))
    (one, slow), (two, quick) = fastest
    return Worth(
        speedup(slow, quick).value, scores[0][0], (scores[0][1], scores[1][1]), (one.precision, two.precision)
    )  # fmt: skip


def _artifacts(exporters: Sequence[Any], state: State, folder: Path) -> Iterator[Artifact]:
    """What the target's runtime takes of what the exporters write of a model; where none is, what it builds itself."""
    found = 0
    several: list[Sequence[Any]] = [one.candidates(state) if isinstance(one, Fastest) else [one] for one in exporters]
    for number, exporter in enumerate(one for group in several for one in group):
        if not {fact.name for fact in exporter.requires} <= state.facts.keys():
            continue
        place = folder / f"{number}-{exporter.kind}"
        try:
            artifact = exporter.run(state, place)
        except ExportError as error:
            say(f"left out: {error}")
            continue
        if takes(state.target, place, state.task.generates):
            found += 1
            yield artifact
    if not found:
        state.build(state.model, folder / "built")
        yield Artifact.of(state.target.chosen, folder / "built", 0.0, FLOAT, {})


def _score(state: State, artifact: Artifact) -> tuple[str, float]:
    """The headline score of an artifact: that of its model where it is in float32 or takes but one shape."""
    model: Any = state.model
    if artifact.precision != FLOAT:
        session = open_artifact(Path(artifact.path), state.target)
        model = model if session.fixed else Opened(session, state.model.config)
    scores = evaluate(model, state.data, state.task, split=SPLIT, teacher=state.teacher)
    metric, score = headline(state.task, scores)
    return metric, score.value
