"""The graph of a plan: what each step follows, the models it makes, and whether the contracts fit together."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, InstanceOf, model_validator

from compress.contract import TEACHER, Fact, Options, Part, Pass, stale_after
from compress.errors import PlanError, nearest
from compress.plan.source import Problem

GIVEN = frozenset({TEACHER})  # what is known before the first step
WORD = re.compile(r"\w[\w.-]*")


class Named(BaseModel):
    """Options under the name they have in YAML; from Python the bare options will do, named as their class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    do: InstanceOf[Options]

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        """Take options for a step that has nothing but them, and name a step that has no name."""
        fields = {"do": given} if isinstance(given, Options) else given
        if isinstance(fields, Mapping) and isinstance(fields.get("do"), Options):
            kind = type(fields["do"])
            fields = {"name": kind.named or kind.__name__.lower(), **fields}
        return fields

    def key_material(self) -> str:
        """Everything of this step that its result depends on, as JSON for a cache key."""
        material = {
            "name": self.name,
            "version": getattr(self.do, "version", 1),
            "options": self.do.model_dump(mode="json"),
        }
        return json.dumps(material, sort_keys=True)

    def written(self) -> Any:
        """The step as it stands in a YAML plan, without the options that are at their defaults."""
        options = self.do.model_dump(mode="json", exclude_defaults=True)
        return {self.name: options} if options else self.name


class Export(Named):
    """An exporter in a plan."""


class Step(Named):
    """A pass in a plan; it follows the step before it, or those named in `after` (none: the dense model)."""

    do: InstanceOf[Pass]
    id: str | None = None
    after: tuple[str, ...] | None = None

    def written(self) -> Any:
        """The step as it stands in a YAML plan, without what is at its default."""
        beside: dict[str, Any] = {"id": self.id} if self.id else {}
        if self.after is not None:
            beside["after"] = list(self.after)
        written = super().written()
        return {**(written if isinstance(written, dict) else {written: None}), **beside} if beside else written


@dataclass(frozen=True)
class Node:
    """One model that a plan makes: what step number `index` yielded under `label` from the models of `parents`.

    `branch` is the path of labels and forks that led here, such as `2.0x` or `fast/2.0x`; empty where nothing forked.
    """

    index: int
    step: Step = field(compare=False)
    parents: tuple[Node, ...]
    label: str
    branch: str

    def history(self) -> dict[int, Node]:
        """The node and all it was made from, by step."""
        return {index: node for parent in self.parents for index, node in parent.history().items()} | {self.index: self}


def follow(steps: Sequence[Step]) -> tuple[list[tuple[int, ...]], list[Problem]]:
    """For each step the indices of those it follows, and what is wrong with `id` and `after`."""
    problems: list[Problem] = []
    counted = Counter(step.name for step in steps)
    names = {step.name: index for index, step in enumerate(steps) if counted[step.name] == 1}
    own: dict[str, int] = {}
    for index, step in enumerate(steps):
        if step.id is None:
            continue
        path = ("passes", index, "id")
        if not WORD.fullmatch(step.id):
            problems.append(Problem(path, f"met '{step.id}'; expected letters, digits, '.', '_' and '-'"))
        if step.id in own:
            first = place(steps, own[step.id])
            problems.append(Problem(path, f"'{step.id}' is the id of {first} already; expected another name"))
        own.setdefault(step.id, index)
    names |= own
    followed: list[tuple[int, ...]] = []
    for index, step in enumerate(steps):
        before = (index - 1,) if index else ()
        if step.after is None:
            followed.append(before)
            continue
        met = [_unfit(steps, index, name, names, counted) for name in step.after]
        problems += [Problem(("passes", index, "after"), text) for text in met if text]
        followed.append(before if any(met) else tuple(dict.fromkeys(names[name] for name in step.after)))
    return followed, problems


def _unfit(steps: Sequence[Step], index: int, name: str, names: Mapping[str, int], counted: Mapping[str, int]) -> str:
    """Why step `index` can't follow the step called `name`; empty where it can."""
    earlier = [known for known, at in names.items() if at < index]
    if name not in names:
        if counted.get(name, 0) > 1:
            return f"'{name}' stands {counted[name]} times in the plan; expected the id of one of them"
        return f"'{name}' is no step; expected one of {', '.join(earlier) or '[] for the dense model'}" + nearest(
            name, earlier
        )
    if names[name] == index:
        return f"'{name}' is this very step, a cycle; expected an earlier step"
    if names[name] > index:
        cycle = ", which in turn follows it, a cycle" if _leads(steps, index, names[name], names) else ""
        return f"'{name}' stands later in the plan{cycle}; expected an earlier step, a plan runs from top to bottom"
    return ""


def _leads(steps: Sequence[Step], first: int, last: int, names: Mapping[str, int]) -> bool:
    """Whether `last` follows `first`, over any number of steps."""
    seen, waiting = set(), [last]
    while waiting:
        index = waiting.pop()
        if index == first:
            return True
        if index < 0 or index in seen:
            continue
        seen.add(index)
        after = steps[index].after
        waiting += [index - 1] if after is None else [names[name] for name in after if name in names]
    return False


def expand(steps: Sequence[Step]) -> tuple[Node, ...]:
    """Every model of the plan, in run order; the models that one run of a pass yields stand together.

    A step runs once for each model that the step before it made. A step that follows several merges those of their
    models that agree on every fork they have in common.
    """
    followed, problems = follow(steps)
    if problems:
        raise PlanError(f"{place(steps, problem.path[1])}: {problem.text}" for problem in problems)
    made: list[list[Node]] = []
    for index, step in enumerate(steps):
        forked = followed.count(followed[index]) > 1 or len(followed[index]) > 1
        made.append([])
        for parents in itertools.product(*(made[parent] for parent in followed[index])):
            past = [parent.history() for parent in parents]
            if any(
                one[key] is not two[key] for one, two in itertools.combinations(past, 2) for key in one.keys() & two
            ):
                continue
            road = [*_road(parents), *([step.id or step.name] if forked else [])]
            for label in step.do.branches:
                branch = "/".join([*road, label] if label else road)
                made[index].append(Node(index, step, parents, label, branch))
    return tuple(itertools.chain.from_iterable(made))


def _road(parents: Sequence[Node]) -> list[str]:
    """The branch that several models share, then the labels that tell apart what only some of them come from."""
    if len(parents) < 2:
        return parents[0].branch.split("/") if parents and parents[0].branch else []
    roads = [parent.branch.split("/") for parent in parents]
    shared = [keys[0] for keys in itertools.takewhile(lambda keys: len(set(keys)) == 1, zip(*roads, strict=False))]
    past = [parent.history() for parent in parents]
    common = set.intersection(*(set(one) for one in past))
    apart = {index: node for one in past for index, node in one.items() if index not in common and node.label}
    return [key for key in shared if key] + [apart[index].label for index in sorted(apart)]


def contradictions(steps: Sequence[Step], passes: Mapping[str, type[Pass]]) -> list[Problem]:
    """What is wrong with the order of the steps, before anything runs; `passes` helps to name a missing step."""
    followed, problems = follow(steps)
    known: list[frozenset[Fact]] = []
    spoiled: list[dict[Fact, int]] = []  # by which step a fact that was known went stale
    fixed: list[int | None] = []  # the step that fixed the format
    for index, step in enumerate(steps):
        parents, do, path = followed[index], step.do, ("passes", index, step.name)
        if len(parents) > 1 and not do.merges:
            text = f"follows {len(parents)} steps, but {step.name} takes one model; expected one name"
            problems.append(Problem(("passes", index, "after"), text))
        facts = frozenset.intersection(*(known[parent] for parent in parents)) if parents else GIVEN
        lost = {fact: by for parent in parents for fact, by in spoiled[parent].items()}
        for fact in sorted(do.requires - facts, key=lambda fact: fact.name):
            problems.append(Problem(path, _missing(steps, index, fact, lost.get(fact), passes)))
        format_by = next((fixed[parent] for parent in parents if fixed[parent] is not None), None)
        if format_by is not None and do.touches & (Part.SHAPE | Part.VALUES):
            by = place(steps, format_by)
            touched = " and ".join(str(part.name).lower() for part in do.touches & (Part.SHAPE | Part.VALUES))
            text = f"touches {touched}, but {by} has fixed the number format; expected it before {by}"
            problems.append(Problem(path, text))
        facts |= do.requires  # a missing fact is told once, where it is first missed
        stale = stale_after(do, facts)
        known.append((facts - stale) | do.provides)
        spoiled.append({**lost, **dict.fromkeys(stale, index)})
        fixed.append(index if format_by is None and do.touches & Part.FORMAT else format_by)
    return problems


def _missing(
    steps: Sequence[Step], index: int, fact: Fact, spoiler: int | None, passes: Mapping[str, type[Pass]]
) -> str:
    """Say that a step misses a fact, who spoiled it and what would mend it."""
    # A contract that depends on options is a property, which a class can't answer.
    listed = [name for name, cls in passes.items() if isinstance(cls.provides, frozenset) and fact in cls.provides]
    givers = listed or list(dict.fromkeys(step.name for step in steps if fact in step.do.provides)) or ["one that does"]
    needs, giver = f"needs '{fact.name}' ({fact.meaning})", " or ".join(givers)
    if spoiler is not None:
        by = place(steps, spoiler)
        return f"{needs}, which {by} has made stale; expected {giver} again between {by} and it"
    late = next((at for at in range(index + 1, len(steps)) if fact in steps[at].do.provides), None)
    if late is not None:
        return f"{needs}, which {place(steps, late)} gives too late; expected {steps[late].name} before it"
    return f"{needs}, which no step before it gives; expected {giver} before it"


def place(steps: Sequence[Step], index: Any) -> str:
    """A step as messages name it: `passes[2].ziplm`."""
    return f"passes[{index}].{steps[index].name}"
