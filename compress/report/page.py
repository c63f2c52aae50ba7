"""report.html: one file that needs nothing else, no network and no script; the layout stands in page.html.j2."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress.report import numbers, pictures, wording
from compress.report.schema import Axis, Branch, Report, Step


@dataclass(frozen=True)
class Block:
    """The axes of one transformer block, or those that blocks share."""

    label: str
    axes: list[Axis] = field(default_factory=list)


@dataclass(frozen=True)
class Moment:
    """A step on the time line: `start` and `stop` in seconds since the branch began."""

    step: Step
    start: float
    stop: float


def page(report: Report) -> str:
    """Draw up the page; every text from the report is escaped."""
    # StrictUndefined: a name the template misspells is an error, not a hole in the page.
    environment = Environment(
        loader=PackageLoader("compress", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    return template.render(
        report=report,
        words=wording,
        numbers=numbers,
        pictures=pictures,
        metric=wording.headline(report),
        slowest=slowest(report),
        longest=max((seconds(branch.steps) for branch in report.branches), default=0.0),
        quality=quality(report),
        stacks=stacks,
        moments=moments,
        kind=kind,
    )


def kind(branch: Branch) -> str:
    """The class that colours a branch: a missed promise differs."""
    return "missed" if branch.promised_speedup is not None and not branch.met else "met"


def slowest(report: Report) -> float:
    """Milliseconds at the right end of the latency bars."""
    models = [report.baseline, *report.branches]
    edges = [edge for model in models for edge in (model.milliseconds, model.timing.high if model.timing else None)]
    return max((edge for edge in edges if edge is not None), default=0.0)


def quality(report: Report) -> Markup | None:
    """The quality picture, or None where no model has both a speed and the headline metric."""
    metric = wording.headline(report)
    if metric is None:
        return None
    points = []
    for branch in report.branches:
        value, ratio = branch.quality.get(metric), branch.measured_speedup
        if value is None or ratio is None:
            continue
        points.append(
            pictures.Point(
                name=branch.name,
                speed=ratio,
                quality=value,
                speed_interval=branch.measured_interval,
                quality_interval=branch.quality_interval.get(metric),
                before=branch.quality_before_recovery.get(metric),
                before_interval=branch.quality_before_recovery_interval.get(metric),
                kind=kind(branch),
            )
        )
    if not points:
        return None
    dense = report.baseline.quality.get(metric)
    if dense is not None:
        limits = report.baseline.quality_interval.get(metric)
        points.insert(0, pictures.Point("dense", 1.0, dense, quality_interval=limits, kind="dense"))
    return pictures.quality(points, metric)


def stacks(axes: Iterable[Axis]) -> dict[str, list[Block]]:
    """Axes by stack of blocks and by block, in the order met; shared axes stand under the empty name."""
    found: dict[str, dict[str, Block]] = {}
    for axis in axes:
        stack, _, label = axis.block.rpartition(".")
        blocks = found.setdefault(stack, {})
        blocks.setdefault(axis.block or axis.name, Block(label or axis.name)).axes.append(axis)
    return {stack: list(blocks.values()) for stack, blocks in found.items()}


def seconds(steps: Iterable[Step]) -> float:
    """What the steps of a branch took together."""
    return sum(step.seconds or 0.0 for step in steps)


def moments(steps: list[Step]) -> list[Moment]:
    """Steps one after another on a clock that starts at zero."""
    ends = list(accumulate(step.seconds or 0.0 for step in steps))
    return [Moment(step, end - (step.seconds or 0.0), end) for step, end in zip(steps, ends, strict=True)]
