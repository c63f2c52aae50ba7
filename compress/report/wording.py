"""The words of a report: models told in a phrase, the verdict in one sentence, and what was not done and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath

import yaml
from pydantic import JsonValue

from compress.contract import FLOAT
from compress.report.numbers import ABSENT, digits, duration, figure, interval, latency, times
from compress.report.schema import Artifact, Axis, Branch, Measured, Missed, Report, Step

NUMBERED = re.compile(r"(.*?\.)(\d+)(\..*)")  # a block's layer
NAMED = 4  # things that a sentence names
LOWER_IS_BETTER = frozenset({"perplexity", "kl", "loss", "calibration_error"})
NAMES = {"onnxruntime": "ONNX Runtime", "torch": "PyTorch", "openvino": "OpenVINO", "cpu": "CPU", "cuda": "CUDA"}


def whole_run(report: Report) -> str:
    """How long the run took, and that a resumed one took its finished steps from the cache."""
    steps = max((sum(step.seconds or 0 for step in branch.steps) for branch in report.branches), default=0)
    if report.seconds is None or steps <= report.seconds:
        return f"whole run: {duration(report.seconds)}"
    return f"resumed run: {duration(report.seconds)}; the steps took {duration(steps)} when they ran"


def took(model: Measured) -> str:
    """The latency of a model and, where it generates, its tokens a second: ``812 ms, 158 tokens/s``."""
    rate = model.tokens_per_second
    told = "" if rate is None else f", {rate:,.{digits(rate)}f} tokens/s"
    return latency(model.milliseconds) + told


def promise(branch: Branch) -> str:
    """The speed-up asked for: ``2x``, ``1.5x``, or that none was."""
    return "none" if branch.promised_speedup is None else f"{branch.promised_speedup:g}x"


def speed(branch: Branch | Artifact) -> str:
    """The measured speed-up with its interval: ``2.03x [2.01, 2.05]``."""
    limits = branch.measured_interval
    return times(branch.measured_speedup) + (f" [{limits[0]:.2f}, {limits[1]:.2f}]" if limits else "")


def measured(branch: Branch) -> str:
    """The measured speed-up as a phrase: ``2.03x [2.01, 2.05] measured``, or that it wasn't."""
    return ABSENT if branch.measured_speedup is None else f"{speed(branch)} measured"


def scored(model: Measured | Artifact, metric: str) -> str:
    """A metric of a model with its interval."""
    return f"{figure(model.quality.get(metric))} {interval(model.quality_interval.get(metric))}".rstrip()


def unrecovered(branch: Branch, metric: str) -> str:
    """A metric of a branch as it was before its recovery, with its interval."""
    limits = branch.quality_before_recovery_interval.get(metric)
    return f"{figure(branch.quality_before_recovery.get(metric))} {interval(limits)}".rstrip()


def elsewhere(model: Measured, metric: str) -> str:
    """A metric of a model on data of another domain, with its interval."""
    return f"{figure(model.quality_other.get(metric))} {interval(model.quality_other_interval.get(metric))}".rstrip()


def layers(branch: Branch) -> dict[str, dict[str, str]]:
    """How alike each block's output is to that of the dense block it was: by the stack, then by the block's number."""
    found: dict[str, dict[str, str]] = {}
    for name, value in branch.layers.items():
        stack, _, number = name.rpartition(".")
        found.setdefault(stack, {})[number] = "constant" if value is None else f"{value:.4f}"
    return found


def fate(axis: Axis) -> str:
    """What happened to the axis, in a word or none: removed, whole, shared by blocks."""
    words = ["removed"] if not axis.kept else ["whole"] if len(axis.kept) == axis.dense else []
    return ", ".join([*words, *([] if axis.block else ["shared by blocks"])])


def origin(artifact: Artifact) -> str:
    """What a speed-up comes from: ``1.20x runtime, 2.01x structure, 1.32x precision``."""
    found = artifact.factors
    told = {} if found is None else {name: getattr(found, name) for name in type(found).model_fields}
    return ", ".join(f"{times(value)} {name}" for name, value in told.items())


def stay(artifact: Artifact) -> str:
    """Whether an artifact was kept, and why, where that was asked."""
    word = "kept" if artifact.kept else "put aside"
    return f"{word}: {artifact.reason}" if artifact.reason else word


def standing(branch: Branch) -> str:
    """What became of the promise: a word or two."""
    if branch.promised_speedup is None:
        return "no promise"
    return {True: "met", False: "missed", None: "not proved"}[branch.met]


def setting(report: Report) -> dict[str, JsonValue]:
    """The target: with `auto` resolved where the environment tells it, else as the plan has it."""
    told = report.environment.get("target", report.planned.get("target"))
    return told if isinstance(told, dict) else {}


def where(report: Report) -> str:
    """Runtime and device, as in ``ONNX Runtime CPU``."""
    words = [str(setting(report).get(key) or "") for key in ("runtime", "device")]
    return " ".join(NAMES.get(word, word) for word in words if word) or "the target"


def shape(report: Report) -> str:
    """Everything else about the target, as in ``batch 1, sequence 128, threads 1, dtype float32``."""
    told = {key: value for key, value in setting(report).items() if value is not None}
    return ", ".join(f"{key} {value}" for key, value in told.items() if key not in ("runtime", "device"))


def title(report: Report) -> str:
    """The model's name, without its folder."""
    model = report.planned.get("model")
    return PurePath(str(model)).name if model else "model"


def headline(report: Report) -> str | None:
    """The metric that the pictures show."""
    holders: list[Measured] = [report.baseline, *report.branches]
    return report.headline or next((metric for holder in holders for metric in holder.quality), None)


def metrics(report: Report) -> list[str]:
    """Every metric told anywhere, the headline first."""
    found = [headline(report), *report.baseline.quality]
    for branch in report.branches:
        found += [*branch.quality, *branch.quality_before_recovery]
    return list(dict.fromkeys(metric for metric in found if metric))


def verdict(report: Report) -> str:
    """The outcome in one sentence; what was missed is said by name, the first of many."""
    promised = [branch for branch in report.branches if branch.promised_speedup is not None]
    beyond = [f"{one.name} ({limit(one)})" for one in report.out_of_reach]
    if not promised:
        found = "; ".join(outcome(report, branch) for branch in report.branches)
        found += f"; missed: {some(beyond)}" if beyond else ""
        return f"No speed-up was promised: {found or 'there is no compressed model'}."
    if len(promised) == 1 and not beyond:
        (only,) = promised
        return f"{promise(only)} promised, {measured(only)} on {where(report)}: {standing(only)}."
    met = [branch for branch in promised if branch.met]
    missed = [*(f"{promise(one)} ({speed(one)})" for one in promised if not one.met), *beyond]
    told = f"{len(met)} of {len(met) + len(missed)} promised speed-ups met on {where(report)}"
    return f"{told}; missed: {some(missed)}." if missed else f"{told}: {some(map(speed, met))}."


def limit(missed: Missed) -> str:
    """That a model was out of reach, and how fast one can be: ``out of reach, 3.10x at most``."""
    return "out of reach" + ("" if missed.fastest is None else f", {times(missed.fastest)} at most")


def some(things: Iterable[str]) -> str:
    """The first few of a list in words, and how many more there are."""
    first, rest = (known := list(things))[:NAMED], known[NAMED:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def outcome(report: Report, branch: Branch) -> str:
    """What came of a branch without a promise: its speed, its quality, and the dense model's."""
    metric = headline(report)
    found = f"{branch.name} {measured(branch)} on {where(report)}"
    return f"{found}, {metric} {scored(branch, metric)}, dense {scored(report.baseline, metric)}" if metric else found


def omissions(report: Report) -> list[str]:
    """What was not done, not reached or not measured, each with its cause; what branches share is told once."""
    found = [f"Dense model: {what} {ABSENT}." for what in unmeasured(report.baseline)]
    found += [f"Dense model: {warning}" for warning in doubts(report.baseline)]
    found += [f"{one.name}: not made; {one.reason.rstrip('.')}." for one in report.out_of_reach]
    for branch in report.branches:
        if branch.promised_speedup is not None and not branch.met:
            cause = f"; {branch.cause.rstrip('.')}" if branch.cause else ""
            found.append(f"{branch.name}: {promise(branch)} promised, {measured(branch)}{cause}.")
        found += [f"{branch.name}: {what} {ABSENT}." for what in unmeasured(branch)]
        found += [f"{branch.name}: {warning}" for warning in doubts(branch)]
        for artifact in branch.artifacts:
            if artifact.worst_error is None:
                found.append(f"{branch.name}: worst error of {artifact.path} {ABSENT}.")
            if not artifact.kept:
                found.append(f"{branch.name}: {artifact.kind} {artifact.precision} put aside; {artifact.reason}.")
            if artifact.precision != FLOAT and not artifact.quality:
                found.append(f"{branch.name}: quality of {artifact.path} {ABSENT}.")
            found += [f"{artifact.path} left {what}: {why}." for what, why in by_reason(artifact.figures.skipped)]
            found += [f"{artifact.path}: {warning}" for warning in artifact.figures.warnings]
        found += [f"{branch.name}: {what} not made; {why.rstrip('.')}." for what, why in branch.refused.items()]
        for step in branch.steps:
            found += notes(step, branch.name)
    return list(dict.fromkeys(found))


def unmeasured(model: Measured) -> Iterator[str]:
    """Names of the figures that a model lacks."""
    for what in ("parameters", "bytes", "milliseconds"):
        if getattr(model, what) is None:
            yield what
    yield from (f"quality ({metric})" for metric, value in model.quality.items() if value is None)
    if not model.quality:
        yield "quality"


def doubts(model: Measured) -> Iterator[str]:
    """Why a reader should doubt the figures of a model."""
    if model.timing and model.timing.quantised:
        yield "its times snap to steps, so its latency is less sure than the interval says."
    if model.timing and model.timing.crowded and model.timing.waited is not None:
        yield f"others had the cores for {model.timing.waited:.0%} of the time that it was measured; measure it alone."
    yield from model.warnings


def notes(step: Step, branch: str) -> Iterator[str]:
    """What a step skipped, was rejected for, or warns of."""
    if not step.kept:
        yield f"{branch}: {step.name} rejected; {(step.reason or 'the run gives no reason').rstrip('.')}."
    for what, reason in by_reason(step.figures.skipped):
        yield f"{step.name} skipped {what}: {reason.rstrip('.')}."
    yield from (f"{step.name}: {warning}" for warning in step.figures.warnings)


def by_reason(skipped: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What was left out for each reason; names that differ in one number alone as ``layer.[0, 2, 3].output``."""
    for reason in dict.fromkeys(skipped.values()):
        alike: dict[tuple[str, ...], list[str]] = {}
        for name in (name for name, why in skipped.items() if why == reason):
            before, number, after = numbered.groups() if (numbered := NUMBERED.fullmatch(name)) else (name, "", "")
            alike.setdefault((before, after), []).append(number)
        several = {places: many[0] if len(many) == 1 else f"[{', '.join(many)}]" for places, many in alike.items()}
        yield ", ".join(f"{before}{many}{after}" for (before, after), many in several.items()), reason


def details(step: Step) -> dict[str, str]:
    """Options and figures of a step in short: long lists and tables as their length."""
    return {name: brief(value) for name, value in {**step.options, **(step.figures.model_extra or {})}.items()}


def brief(value: JsonValue, longest: int = 80) -> str:
    """A JSON value in a few words; a list or table of more than `longest` letters as its length."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list) and len(str(value)) > longest:
        return f"{len(value)} values"
    if isinstance(value, list):
        return ", ".join(map(brief, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {brief(inner)}" for key, inner in value.items()) or "none"
    return str(value)


def flat(table: dict[str, JsonValue], prefix: str = "") -> dict[str, str]:
    """Nested tables as one, with dotted keys."""
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = brief(value, longest=1000)
    return found


def plan_text(report: Report) -> str:
    """The plan as YAML."""
    if isinstance(report.plan, str):
        return report.plan
    return yaml.safe_dump(report.plan, sort_keys=False, allow_unicode=True, width=100)
