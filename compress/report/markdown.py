"""report.md: the report as text tables, for terminals and code hosts."""

from __future__ import annotations

from collections.abc import Iterable

from compress.report import numbers, wording
from compress.report.schema import Branch, Measured, Report


def markdown(report: Report) -> str:
    """Draw up the text; everything from the report is escaped."""
    setting = f"Measured with {wording.shape(report) or 'an unnamed setting'}"
    parts = [
        f"# {clean(wording.title(report))}: compression report",
        f"**{clean(wording.verdict(report))}**",
        clean(f"{setting}; {wording.whole_run(report)}."),
        "## Results",
        results(report),
        "## Quality",
        quality(report),
        "## What survived",
        *map(survivors, report.branches),
        "## Time line",
        *map(timeline, report.branches),
        "## Artifacts",
        artifacts(report),
        "## Not done, not reached, in doubt",
        "\n".join(f"- {clean(text)}" for text in wording.omissions(report)) or "Nothing.",
        "## Environment",
        table(("what", "value"), wording.flat(report.environment).items()),
        "## Plan",
        fence(wording.plan_text(report)),
    ]
    return "\n\n".join(parts) + "\n"


def clean(text: str) -> str:
    """Escape what Markdown or HTML would take for markup, and keep to one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_|[]" else letter for letter in text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table, or the word that there is nothing to show."""
    lines = [f"| {' | '.join(map(clean, row))} |" for row in rows]
    names = list(map(clean, head))
    return "\n".join([f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}", *lines]) if lines else "Nothing told."


def fence(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}yaml\n{text.rstrip()}\n{ticks}"


def results(report: Report) -> str:
    """Speed, latency and size of every model."""

    def row(model: Measured, *speed: str) -> tuple[str, ...]:
        sizes = numbers.scaled(model.parameters, ""), numbers.scaled(model.bytes, "B")
        return (*speed, wording.took(model), *sizes)

    rows = [row(report.baseline, "dense", "", "1x", "")]
    for branch in report.branches:
        speeds = wording.promise(branch), wording.speed(branch), wording.standing(branch)
        rows.append(row(branch, branch.name, *speeds))
    rows += [(one.name, "", wording.limit(one), "missed", "", "", "") for one in report.out_of_reach]
    return table(("model", "promised", "measured", "outcome", "latency", "parameters", "size"), rows)


def quality(report: Report) -> str:
    """Every metric of every model, before and after recovery, with its interval."""
    names = wording.metrics(report)
    rows = [("dense", *(wording.scored(report.baseline, name) for name in names))]
    if report.baseline.quality_other:
        rows.append(("dense, other domain", *(wording.elsewhere(report.baseline, name) for name in names)))
    for branch in report.branches:
        if branch.quality_before_recovery:
            rows.append((f"{branch.name}, before recovery", *(wording.unrecovered(branch, name) for name in names)))
        rows.append((branch.name, *(wording.scored(branch, name) for name in names)))
        if branch.quality_other:
            rows.append((f"{branch.name}, other domain", *(wording.elsewhere(branch, name) for name in names)))
    return table(("model", *names), rows) if names else "Not measured."


def survivors(branch: Branch) -> str:
    """Sizes of every axis of a branch."""
    rows = [(axis.name, f"{len(axis.kept)}", f"{axis.dense}", wording.fate(axis)) for axis in branch.axes]
    sizes = f"### {clean(branch.name)}\n\n{table(('axis', 'kept', 'dense', ''), rows)}"
    alike = [f"{stack} {', '.join(map(': '.join, blocks.items()))}" for stack, blocks in wording.layers(branch).items()]
    told = clean(f"Output of each block like the dense one's (CKA), {'; '.join(alike)}.")
    return f"{sizes}\n\n{told}" if branch.layers else sizes


def timeline(branch: Branch) -> str:
    """Steps of a branch in their order."""
    rows = [
        (
            step.name,
            numbers.duration(step.seconds),
            "kept" if step.kept else "rejected",
            step.reason or "",
            "; ".join(f"{name}: {value}" for name, value in wording.details(step).items()),
        )
        for step in branch.steps
    ]
    return f"### {clean(branch.name)}\n\n{table(('pass', 'took', 'result', 'reason', 'options and figures'), rows)}"


def artifacts(report: Report) -> str:
    """Files that left the run."""
    metric = wording.headline(report)
    rows = [
        (
            branch.name, one.kind, one.precision, one.path, numbers.scaled(one.bytes, "B"),
            numbers.latency(one.milliseconds), wording.speed(one), wording.origin(one),
            wording.scored(one, metric) if metric else numbers.ABSENT,
            numbers.error(one.worst_error), wording.stay(one), one.sha256,
        )
        for branch in report.branches
        for one in branch.artifacts
    ]  # fmt: skip
    head = (
        "model",
        "kind",
        "weights",
        "path",
        "size",
        "latency",
        "speed-up",
        "made of",
        metric or "quality",
        "worst error",
        "",
    )
    return table((*head, "sha256"), rows)
