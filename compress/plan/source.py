"""The text of a plan: YAML to plain values, with the place each was written at and YAML 1.1's traps explained."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor

Path = tuple[str | int, ...]

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
SIXTIES = re.compile(r"\d+(:\d+)+(\.\d*)?")


class Problem(NamedTuple):
    """One thing wrong with a plan: where it stands, what was met and what was expected."""

    path: Path
    text: str


@dataclass
class Source:
    """A plan's plain values, beside the place and, for bare scalars, the spelling of each."""

    name: str
    value: Any = None
    places: dict[Path, str] = field(default_factory=dict)
    spelled: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def blame(self, path: Path, text: str) -> None:
        """Note a problem, unless one at or above its path tells of the same cause."""
        if not any(problem.path == path[: len(problem.path)] for problem in self.problems if problem.path):
            self.problems.append(Problem(path, text))

    def tell(self, problems: Iterable[Problem]) -> list[str]:
        """Problems as lines of `FILE:LINE: where: text`, in the order of the file."""
        order = {path: index for index, path in enumerate(self.places)}
        located = [(self._known(problem.path), problem) for problem in problems]
        located.sort(key=lambda pair: order.get(pair[0], -1))
        return [
            ": ".join(part for part in (self.places.get(known, self.name), where(problem.path), problem.text) if part)
            for known, problem in located
        ]

    def spelling(self, path: Path, value: Any, text: bool = False) -> str:
        """Say how YAML came to read a bare scalar as what its writer may not have meant; `text` was expected."""
        bare = self.spelled.get(path, "")
        if isinstance(value, bool) and bare.lower() not in ("true", "false", ""):
            return f" (YAML reads a bare {bare} as {str(value).lower()}; for the word write '{bare}')"
        if text and isinstance(value, int | float) and bare:
            return f" (YAML reads a bare {bare} as a number; for the word write '{bare}')"
        return ""

    def override(self, assignment: str) -> None:
        """Set one value by its dotted path, as in `passes.1.ziplm.speedups=[2, 3]`."""
        route, found, text = assignment.partition("=")
        keys = route.strip().split(".")
        label = f"given {assignment}"
        if not found or not all(keys):
            self.places[(label,)] = label
            self.problems.append(Problem((), f"{label}: expected key=value with a dotted key such as target.threads=2"))
            return
        path: Path = ()
        holder = self.value = {} if self.value is None else self.value
        for key, deeper in zip(keys, [*keys[1:], None], strict=True):
            step = int(key) if isinstance(holder, list) and key.isdecimal() else key
            path = (*path, step)
            size = len(holder) if isinstance(holder, list) else 0
            if not (isinstance(holder, dict) or (isinstance(step, int) and step < size)):
                self.places[path] = label
                expected = f"expected a place 0..{size - 1}" if isinstance(holder, list) else "nothing lies deeper here"
                self.problems.append(Problem(path, f"there is no such value to set; {expected}"))
                return
            if deeper is None:
                self._put(holder, step, path, parse(text, label))
            else:
                holder[step] = holder = _opened(holder, step)

    def _put(self, holder: Any, step: Any, path: Path, given: Source) -> None:
        """Hang an override's values, places and problems where they belong."""
        holder[step] = given.value
        self.places[path] = given.name
        self.places |= {(*path, *inner): given.name for inner in given.places}
        self.spelled = {key: text for key, text in self.spelled.items() if key[: len(path)] != path}
        self.spelled |= {(*path, *inner): text for inner, text in given.spelled.items()}
        self.problems += [Problem((*path, *inner), text) for inner, text in given.problems]

    def _known(self, path: Path) -> Path:
        """The nearest place at or above `path` that stands in the text."""
        return next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.places), ())


def where(path: Path) -> str:
    """A path as people write it: `passes[2].ziplm.speedups`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def parse(text: str, name: str) -> Source:
    """Read one YAML document; what is wrong with it as YAML is noted, not raised."""
    source = Source(name)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        source.places[()] = f"{name}:{line}"
        source.problems.append(Problem((), f"not YAML: {error.problem or error.context}; expected keys and values"))
    except yaml.reader.ReaderError as error:
        source.places[()] = f"{name}:{text.count(chr(10), 0, error.position) + 1}"
        source.problems.append(Problem((), f"not YAML: {error.reason}; expected plain text"))
    else:
        source.value = None if root is None else _value(source, root, (), ())
    return source


def _value(source: Source, node: yaml.Node, path: Path, above: tuple[yaml.Node, ...]) -> Any:
    """The plain value of a node, noted in `source` on the way."""
    source.places.setdefault(path, f"{source.name}:{node.start_mark.line + 1}")
    if node in above:
        source.blame(path, "an alias that holds itself; expected values that end")
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_value(source, item, (*path, index), (*above, node)) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(source, node, path)
    result: dict[str, Any] = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode):
            source.blame(path, "a key that is a list or a mapping; expected a word")
            continue
        here = (*path, key.value)
        line = f"{source.name}:{key.start_mark.line + 1}"
        if key.value in result:
            source.blame(here, f"stands twice, first at {source.places[here]}; expected once")
            source.places[here] = line
            continue
        source.places[here] = line
        result[key.value] = _value(source, item, here, (*above, node))
    return result


def _scalar(source: Source, node: yaml.ScalarNode, path: Path) -> Any:
    """A scalar as its writer meant it: `3e-5` is a number, `2:4` is refused, everything quoted is text."""
    if node.style is not None:
        return node.value
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float") and SIXTIES.fullmatch(node.value):
        source.blame(path, f"YAML reads a bare {node.value} in base 60; expected {{keep: 2, of: 4}} or '{node.value}'")
        return None
    if kind in ("int", "float", "bool"):
        source.spelled[path] = node.value
        read = getattr(SafeConstructor, f"construct_yaml_{kind}")
        try:
            return read(SafeConstructor(), node)
        except (ValueError, LookupError):  # only an explicit tag, such as `!!int x`, comes here
            source.blame(path, f"'{node.value}' can't be read as {kind}; expected no tag")
            return None
    if NUMBER.fullmatch(node.value):
        source.spelled[path] = node.value
        return float(node.value)
    return None if kind == "null" else node.value


def _opened(holder: Any, step: Any) -> Any:
    """The value at `step`, made ready to take keys: a pass written as a bare name gets a mapping for its options."""
    child = holder.get(step) if isinstance(holder, dict) else holder[step]
    if child is None:
        return {}
    return {child: {}} if isinstance(holder, list) and isinstance(child, str) else child
