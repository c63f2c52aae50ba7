"""From plain values to a plan's parts: every key, name and option checked, every problem kept with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from compress.contract import Options, Pass
from compress.data import DataOptions
from compress.errors import nearest
from compress.plan.source import Path, Source
from compress.plan.steps import GRADUAL, Gradual, Stages, Step, takes, unfit
from compress.target import Target
from compress.verdict import KeepIf

KEYS = ("model", "task", "data", "target", "passes", "export", "out")
BESIDE = ("id", "after", "keep_if")
DEFAULT_EXPORT = ["huggingface", "onnx"]
Built = TypeVar("Built", bound=BaseModel)


class Tables(NamedTuple):
    """What a plan can name: pass classes and exporter classes, by the names they have in YAML."""

    passes: Mapping[str, type[Pass]]
    exporters: Mapping[str, type[Options]]


def read_parts(source: Source, tables: Tables) -> dict[str, Any]:
    """Build what can be built of a plan; a key is missing from the result where `source` now holds its problems."""
    value = {} if source.value is None else source.value
    if not isinstance(value, dict):
        source.blame((), f"{_met(value)}; expected keys such as model, data and passes")
        return {}
    for key in value.keys() - set(KEYS):
        source.blame((key,), f"unknown key; expected one of {', '.join(KEYS)}{nearest(key, KEYS)}")
    parts: dict[str, Any] = {}
    for key in ("model", "task", "out"):
        if (text := value.get(key)) is None:
            continue
        if isinstance(text, str):
            parts[key] = text
        else:
            source.blame((key,), f"{_met(text)}; expected text{source.spelling((key,), text, text=True)}")
    for key, cls in (("data", DataOptions), ("target", Target)):
        built = _build(source, cls, value.get(key), (key,))
        if built is not None:
            parts[key] = built
    for key, table in (("passes", tables.passes), ("export", tables.exporters)):
        items = value.get(key)
        if key == "export" and items is None:
            items = [name for name in DEFAULT_EXPORT if name in table]
        steps = list(_named(source, items or [], table, (key,)))
        if None not in steps and not any(problem.path[:1] == (key,) for problem in source.problems):
            parts[key] = steps
    return parts


def _named(source: Source, items: Any, table: Mapping[str, type[Any]], place: Path) -> Iterator[Any]:
    """Yield each step or exporter of the list at `place`, None for one that can't be built.

    It is a gradual step, or the fields of a plain one.
    """
    kind, beside = ("exporter" if place == ("export",) else "pass"), (BESIDE if place == ("passes",) else ())
    known = [*table, GRADUAL] if beside else list(table)
    if not isinstance(items, list):
        source.blame(place, f"{_met(items)}; expected a list, each line starting with '- '")
        return
    for index, item in enumerate(items):
        path: Path = (*place, index)
        fields = {item: None} if isinstance(item, str) else item
        if not isinstance(fields, dict):
            source.blame(path, f"{_met(item)}; expected the name of a {kind}, or a name with its options")
            yield None
            continue
        names = [name for name in fields if name not in beside]
        if not names:
            source.blame(path, f"names no {kind}; expected one of {', '.join(known)}")
            yield None
            continue
        name = next((name for name in names if name in known), names[0])
        if name not in known:
            source.blame((*path, name), f"unknown {kind}; expected one of {', '.join(known)}{nearest(name, known)}")
            yield None
            continue
        for stray in [other for other in names if other != name]:
            expected = f"expected {' or '.join(beside)} here; " if beside else ""
            deeper = f"{expected}options stand one level deeper, under {name}:{nearest(stray, beside)}"
            source.blame((*path, stray), f"unknown key beside the {kind} {name}; {deeper}")
        extra = {other: _beside(source, other, fields[other], (*path, other)) for other in beside if other in fields}
        if name not in table:
            if extra.pop("keep_if", None) is not None:
                source.blame((*path, "keep_if"), "is for a pass; expected none beside a gradual step")
            yield _gradual(source, fields[name], extra, table, (*path, name))
            continue
        do = _build(source, table[name], fields[name], (*path, name))
        yield None if do is None else {"name": name, "do": do, **extra}


def _gradual(
    source: Source, value: Any, beside: dict[str, Any], table: Mapping[str, type[Pass]], path: Path
) -> Gradual | None:
    """A gradual step, or None with its problems noted; its passes are built for every target, to find all of them."""
    stages = _build(source, Stages, value, path)
    if stages is None:
        return None
    place = (*path, "passes")
    for target in stages.targets.values():
        passes = list(_named(source, _filled(source, stages, target, table, place), table, place))
    if any(problem.path[: len(place)] == place for problem in source.problems):
        return None
    steps = [Step(**fields) for fields in passes]
    for at, problem in unfit(steps, stages.filled):
        source.blame(place if at is None else (*place, at, steps[at].name), problem)
        return None
    said = {name: getattr(stages, name) for name in Stages.model_fields if name != "passes"}
    return Gradual(**said, passes=tuple(steps), **beside)


def _filled(source: Source, stages: Stages, target: Any, table: Mapping[str, type[Pass]], place: Path) -> Any:
    """The passes of a gradual step with the target where one takes it; what isn't well formed stays as it is."""
    items, filled_in = stages.passes, stages.filled
    if not isinstance(items, list):
        return items
    filled = []
    for index, item in enumerate(items):
        fields = {item: None} if isinstance(item, str) else item
        for name, options in fields.items() if isinstance(fields, dict) else ():
            if not (name in table and takes(table[name], filled_in) and isinstance(options, dict | None)):
                continue
            if options and filled_in in options:
                told = "is the gradual step's to fill in; expected it there alone"
                source.blame((*place, index, name, filled_in), told)
            fields = {**fields, name: {**(options or {}), filled_in: target}}
        filled.append(fields)
    return filled


def _beside(source: Source, key: str, value: Any, path: Path) -> Any:
    """The value of `id:`, `after:` or `keep_if:`, with one name taken for a list of one."""
    if key == "keep_if":
        return _build(source, KeepIf, value, path)
    names = [value] if key == "id" or isinstance(value, str) else value
    wrong = [name for name in names if not isinstance(name, str)] if isinstance(names, list) else [value]
    if wrong:
        source.blame(path, f"{_met(wrong[0])}; expected a name{source.spelling(path, wrong[0], text=True)}")
        return None
    return value if key == "id" else tuple(names)


def _build(source: Source, cls: type[Built], value: Any, path: Path) -> Built | None:
    """An options object, or None with its problems noted."""
    options = {} if value is None else value
    if not isinstance(options, dict):
        known = next(iter(cls.model_fields), "key")
        source.blame(path, f"{_met(value)}; expected options such as {{{known}: ...}}{source.spelling(path, value)}")
        return None
    try:
        built = cls.model_validate(options)
    except ValidationError as error:
        for at, text in _told(source, cls, options, path, error).items():
            source.blame((*path, *at), text)
        return None
    for key, given in options.items():
        if isinstance(given, bool) and not isinstance(getattr(built, key), bool):
            # pydantic takes true for 1, so that `epochs: no` would train nothing without a word.
            source.blame((*path, key), f"{_met(given)}; expected no switch{source.spelling((*path, key), given)}")
            return None
    return built


def _told(
    source: Source, cls: type[BaseModel], options: dict[str, Any], path: Path, error: ValidationError
) -> dict[Path, str]:
    """Pydantic's findings in the house's words, one a place."""
    told: dict[Path, str] = {}
    for found in error.errors(include_url=False):
        kind, location, met = found["type"], found["loc"], found["input"]
        at = _inside(options, location) if kind not in ("extra_forbidden", "missing") else location
        known = _fields(cls, location[:-1])
        if kind == "extra_forbidden":
            text = f"unknown option; expected one of {', '.join(known) or 'none'}{nearest(str(location[-1]), known)}"
        elif kind == "missing":
            text = "is missing; expected a value, it has no default"
        elif kind == "value_error":
            text = str(found["ctx"]["error"])
        elif kind == "literal_error":
            choices = found["ctx"]["expected"]
            near = nearest(met, choices.replace("'", "").replace(" or ", ", ").split(", "))
            text = f"{_met(met)}; expected {choices}{near or source.spelling((*path, *at), met)}"
        else:
            expected = found["msg"].removeprefix("Input should be ").partition(", unable")[0]
            number = "a number " if expected.startswith(("greater", "less")) else ""
            text = f"{_met(met)}; expected {number}{expected}"
            text += source.spelling((*path, *at), met, text=kind == "string_type")
        told[at] = text if at not in told else f"{told[at]}, or {text.rpartition('; expected ')[2]}"
    return told


def _inside(value: Any, location: Path) -> Path:
    """The part of pydantic's location that names real keys, without its words for the arms of a union."""
    path: list[str | int] = []
    for key in location:
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict) and key in value:
            value = value[key]
            path.append(key)
    return tuple(path)


def _fields(cls: type[BaseModel], location: Path) -> list[str]:
    """The option names of the model at `location` inside `cls`."""
    for key in location:
        if isinstance(key, str) and key in cls.model_fields:
            arms = (cls.model_fields[key].annotation, *get_args(cls.model_fields[key].annotation))
            cls = next((arm for arm in arms if isinstance(arm, type) and issubclass(arm, BaseModel)), cls)
    return list(cls.model_fields)


def _met(value: Any) -> str:
    """A value as a message shows it: its words in quotes, long ones cut."""
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return f"met {text if len(text) <= 60 else text[:57] + '...'}"
