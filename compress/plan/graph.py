"""The graph of a plan: what each step follows, the models it makes, and whether the contracts fit together."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.contract import TEACHER, Fact, Part, Pass, stale_after
from compress.errors import PlanError, nearest
from compress.plan.source import Path, Problem, where
from compress.plan.steps import GRADUAL, Gradual, Step

GIVEN = frozenset({TEACHER})  # what is known before the first step
WORD = re.compile(r"\w[\w.-]*")


Number = tuple[int, ...]  # where a pass stands: its place in the plan and, in a gradual step, its place in there
Steps = Sequence[Step | Gradual]


@dataclass(frozen=True)
class Node:
    """One model that a plan makes: what pass `number` yielded under `label` from the models of `parents`.

    `branch` is the path of labels and forks that led here, such as `2.0x` or `fast/2.0x`; empty where nothing forked.
    """

    number: Number
    step: Step = field(compare=False)
    parents: tuple[Node, ...]
    label: str
    branch: str

    @property
    def index(self) -> int:
        """The place in the plan's list of passes."""
        return self.number[0]

    def history(self) -> dict[int, Node]:
        """The node and all it was made from, the last of each place in the plan."""
        return {index: node for parent in self.parents for index, node in parent.history().items()} | {self.index: self}


@dataclass(frozen=True)
class Link:
    """A pass in the order they run, a gradual step's for each target anew.

    It takes one model of each of `follows`, which are alternatives by their numbers in that order. `member` is the
    target that it works for, and `ends` says that its model is the one of that target, and is delivered.
    """

    number: Number
    step: Step
    follows: tuple[tuple[int, ...], ...]
    member: str = ""
    ends: bool = False

    @property
    def place(self) -> str:
        """The pass as messages name it."""
        return where((*path_of(self.number), self.step.name))


def path_of(number: Number) -> Path:
    """Where in the text of a plan a pass stands."""
    path: Path = ("passes", number[0])
    return (*path, GRADUAL, "passes", number[1]) if len(number) > 1 else path


def follow(steps: Steps) -> tuple[list[tuple[int, ...]], list[Problem]]:
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


def _unfit(steps: Steps, index: int, name: str, names: Mapping[str, int], counted: Mapping[str, int]) -> str:
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


def _leads(steps: Steps, first: int, last: int, names: Mapping[str, int]) -> bool:
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


def chain(steps: Steps, followed: Sequence[tuple[int, ...]]) -> list[Link]:
    """Every pass in the order they run; what follows a gradual step follows each of the models that it delivers."""
    links: list[Link] = []
    last: list[tuple[int, ...]] = []  # for each step the links that its models come from
    for index, step in enumerate(steps):
        follows, ends = tuple(last[parent] for parent in followed[index]), []
        if isinstance(step, Step):
            links.append(Link((index,), step, follows))
            ends.append(len(links) - 1)
        else:
            for member, delivered, passes in step.members():
                for inner, one in enumerate(passes):
                    links.append(Link((index, inner), one, follows, member, delivered and one is passes[-1]))
                    follows = ((len(links) - 1,),)
                ends += [len(links) - 1] if delivered else []
        last.append(tuple(ends))
    return links


def expand(steps: Steps) -> tuple[Node, ...]:
    """Every model of the plan, in run order; the models that one run of a pass yields stand together.

    A step runs once for each model that the step before it made. A step that follows several merges those of their
    models that agree on every fork they have in common.
    """
    followed, problems = follow(steps)
    if problems:
        raise PlanError(f"{place(steps, problem.path[1])}: {problem.text}" for problem in problems)
    made: list[list[Node]] = []
    roads: dict[Node, list[str]] = {}
    for link in chain(steps, followed):
        index = link.number[0]
        forked = followed.count(followed[index]) > 1 or len(followed[index]) > 1
        made.append([])
        for parents in itertools.product(*([node for end in ends for node in made[end]] for ends in link.follows)):
            past = [parent.history() for parent in parents]
            if any(
                one[key] is not two[key] for one, two in itertools.combinations(past, 2) for key in one.keys() & two
            ):
                continue
            if parents and parents[0].index == index:
                road = roads[parents[0]]
            else:
                road = [*_road(parents), *([steps[index].id or steps[index].name] if forked else [])]
            for yielded in link.step.do.branches:
                label = yielded or (link.member if link.ends else "")
                branch = "/".join([*road, name] if (name := yielded or link.member) else road)
                made[-1].append(Node(link.number, link.step, parents, label, branch))
                roads[made[-1][-1]] = road
    return tuple(itertools.chain.from_iterable(made))


def leaves(nodes: Iterable[Node]) -> list[Node]:
    """The models that leave: those that no step goes on from, but for the gradual step they belong to."""
    every = list(nodes)
    inner = {parent for node in every for parent in node.parents if parent.index != node.index or not parent.label}
    return [node for node in every if node not in inner]


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


def contradictions(
    steps: Steps, passes: Mapping[str, type[Pass]], exports: Sequence[tuple[str, frozenset[Fact]]] = ()
) -> list[Problem]:
    """What is wrong with the order of the steps, before anything runs; `passes` helps to name a missing step.

    `exports` are what leaves, each with the facts that it needs of every model that leaves.
    """
    followed, problems = follow(steps)
    links = chain(steps, followed)
    told: dict[tuple[Path, str], Problem] = {}  # a gradual step's passes are looked at for each target, and told once
    known: list[frozenset[Fact]] = []
    spoiled: list[dict[Fact, int]] = []  # by which link a fact that was known went stale
    fixed: list[int | None] = []  # the link that fixed the format

    def tell(path: Path, what: str, text: str) -> None:
        told.setdefault((path, what), Problem(path, text))

    for index, link in enumerate(links):
        do, path = link.step.do, (*path_of(link.number), link.step.name)
        parents = [end for ends in link.follows for end in ends]
        count = len(link.follows) or 1  # the dense model, where it follows no step
        if refusal := do.refusal(count):
            text = f"follows {count} step{'s' if count > 1 else ''}, but {link.step.name} {refusal}"
            tell(("passes", link.number[0], "after"), "merges", text)
        if link.step.keep_if and (count > 1 or len(do.branches) > 1):
            text = "is for a step that follows one model and makes one; expected none beside this one"
            tell(("passes", link.number[0], "keep_if"), "keep_if", text)
        facts = frozenset.intersection(*(known[parent] for parent in parents)) if parents else GIVEN
        lost = {fact: by for parent in parents for fact, by in spoiled[parent].items()}
        for fact in sorted(do.requires - facts, key=lambda fact: fact.name):
            tell(path, fact.name, _missing(links, index, fact, lost.get(fact), passes))
        format_by = next((fixed[parent] for parent in parents if fixed[parent] is not None), None)
        if format_by is not None and do.touches & (Part.SHAPE | Part.VALUES):
            by = links[format_by].place
            touched = " and ".join(str(part.name).lower() for part in do.touches & (Part.SHAPE | Part.VALUES))
            tell(path, "format", f"touches {touched}, but {by} has fixed the number format; expected it before {by}")
        facts |= do.requires  # a missing fact is told once, where it is first missed
        stale = stale_after(do, facts)
        known.append((facts - stale) | (do.provides if link.step.keep_if is None else frozenset()))
        spoiled.append({**lost, **dict.fromkeys(stale, index)})
        fixed.append(index if format_by is None and do.touches & Part.FORMAT else format_by)
    followed_on = {(end, link.number[0]) for link in links for ends in link.follows for end in ends}
    inner = {end for end, by in followed_on if links[end].number[0] != by or not links[end].ends}
    final = [facts for index, facts in enumerate(known) if index not in inner]
    offered = {fact for link in links if link.step.keep_if for fact in link.step.do.provides}
    for index, (name, needed) in enumerate(exports):
        for fact in sorted(needed - offered, key=lambda fact: fact.name):
            if not all(fact in facts for facts in final):
                givers = " or ".join(_givers(links, fact, passes))
                text = f"needs '{fact.name}' ({fact.meaning}) of what leaves; expected {givers} as the last step"
                tell(("export", index, name), fact.name, text)
    return [*problems, *told.values()]


def _givers(links: Sequence[Link], fact: Fact, passes: Mapping[str, type[Pass]]) -> list[str]:
    """Names of the passes that give a fact."""
    # A contract that depends on options is a property, which a class can't answer.
    listed = [name for name, cls in passes.items() if isinstance(cls.provides, frozenset) and fact in cls.provides]
    givers = listed or list(dict.fromkeys(link.step.name for link in links if fact in link.step.do.provides))
    return givers or ["one that does"]


def _missing(
    links: Sequence[Link], index: int, fact: Fact, spoiler: int | None, passes: Mapping[str, type[Pass]]
) -> str:
    """Say that a pass misses a fact, who spoiled it and what would mend it."""
    needs, giver = f"needs '{fact.name}' ({fact.meaning})", " or ".join(_givers(links, fact, passes))
    if spoiler is not None:
        by, mine = links[spoiler].place, links[index].number
        if links[spoiler].number[0] == mine[0] and links[spoiler].number >= mine:
            return f"{needs}, which {by} makes stale for the next target; expected {giver} in the gradual step"
        return f"{needs}, which {by} has made stale; expected {giver} again between {by} and it"
    if unsure := next((link for link in links[:index] if link.step.keep_if and fact in link.step.do.provides), None):
        return f"{needs}, which {unsure.place} gives only where it is kept; expected no keep_if beside that"
    late = next((link for link in links[index + 1 :] if fact in link.step.do.provides), None)
    if late is not None:
        return f"{needs}, which {late.place} gives too late; expected {late.step.name} before it"
    return f"{needs}, which no step before it gives; expected {giver} before it"


def place(steps: Steps, index: Any) -> str:
    """A step as messages name it: `passes[2].ziplm`."""
    return where(("passes", index, steps[index].name))
