"""A plan told to its reader: what each step needs, gives and spoils, as text and as a Mermaid graph."""

from __future__ import annotations

from collections.abc import Iterable

from compress.contract import FACTS, Fact, stale_after
from compress.plan.graph import Number, leaves
from compress.plan.model import Plan
from compress.plan.steps import Gradual, Step


def explain(plan: Plan) -> str:
    """The plan as text: one paragraph a step, then what leaves and under which names."""
    nodes = plan.nodes()
    target = plan.target
    lines = [
        f"model   {plan.model or '(given later)'}, task {plan.task}",
        f"data    {plan.data.source}",
        f"target  {target.device}, {target.runtime}, batch {target.batch}, sequence {target.sequence}, "
        f"{target.threads} thread{'s' if target.threads > 1 else ''}",
    ]
    for index, step in enumerate(plan.passes):
        if isinstance(step, Gradual):
            targets = ", then ".join(step.targets)
            lines += ["", f"{_title((index,), step)}: {targets}{', which alone leaves' * (step.deliver == 'last')}"]
        for number in dict.fromkeys(node.number for node in nodes if node.index == index):
            made = [node for node in nodes if node.number == number]
            after = dict.fromkeys(_title(parent.number, parent.step) for node in made for parent in node.parents)
            lines += ["", _title(number, made[0].step), f"  after   {', '.join(after) or 'the dense model'}"]
            lines += [f"  {what:<7} {text}" for what, text in _contract(made[0].step)]
            if len(made) > 1:
                lines.append(f"  makes   {', '.join(node.branch or '(unnamed)' for node in made)}")
    branches = ", ".join(node.branch or "one model" for node in leaves(nodes))
    exporters = ", ".join(exporter.name for exporter in plan.export) or "nothing"
    return "\n".join([*lines, "", f"export  {exporters}, of {branches}", f"out     {plan.out or '(given later)'}"])


def mermaid(plan: Plan) -> str:
    """The plan's graph in Mermaid's language; every box is a model, every arrow a pass that reads it."""
    nodes = plan.nodes()
    names = {node: f"n{number}" for number, node in enumerate(nodes)}
    lines = ["flowchart TD", '    dense(["dense model"])']
    for node, name in names.items():
        told = [_title(node.number, node.step), *([node.branch] if node.branch else [])]
        told += [f"{what} {text}" for what, text in _contract(node.step)]
        lines.append(f'    {name}["{"<br/>".join(told)}"]')
        lines += [f"    {names[parent]} --> {name}" for parent in node.parents] or [f"    dense --> {name}"]
    for exporter in plan.export:
        lines.append(f'    {exporter.name}[/"{exporter.name}"/]')
        lines += [f"    {names[leaf]} --> {exporter.name}" for leaf in leaves(nodes)]
    return "\n".join(lines)


def _title(number: Number, step: Step | Gradual) -> str:
    """A step's number, name and id."""
    return f"{'.'.join(map(str, number))} {step.name}{f' ({step.id})' if step.id else ''}"


def _contract(step: Step) -> list[tuple[str, str]]:
    """What a step needs, gives, changes and makes stale, leaving out what is nothing."""
    do = step.do
    parts = " and ".join(str(part.name).lower() for part in do.touches)
    stale = stale_after(do, frozenset(FACTS.values()) | do.requires)
    told = [("needs", _names(do.requires)), ("gives", _names(do.provides)), ("touches", parts)]
    return [(what, text) for what, text in [*told, ("spoils", _names(stale)), ("keeps", _names(do.keeps))] if text]


def _names(facts: Iterable[Fact]) -> str:
    """Facts by name, in alphabetical order."""
    return ", ".join(sorted(fact.name for fact in facts))
