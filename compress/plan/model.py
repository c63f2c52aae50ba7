"""Plan: a model, its data, a target, the passes and what leaves; read from YAML or written in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from compress.contract import Fact
from compress.data import DataOptions
from compress.errors import PlanError
from compress.plan.graph import Node, contradictions, expand
from compress.plan.reader import Tables, read_parts
from compress.plan.source import Problem, Source, parse
from compress.plan.steps import Export, Gradual, Step
from compress.plan.world import locate, obstacles, stages
from compress.target import Target


class Plan(BaseModel):
    """What is to be done to a model, fully said.

    `model` is a folder, a hub name, or `package:NAME/FOLDER`; `out` the folder that results go to. A plan read from
    YAML remembers the lines it was written on, so that `check` can name them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    task: str = "auto"
    data: DataOptions = Field(default_factory=DataOptions)
    target: Target = Field(default_factory=Target)
    passes: tuple[Step | Gradual, ...]
    export: tuple[Export, ...] = ()
    out: str | None = None

    _source: Source = PrivateAttr(default_factory=lambda: Source("plan"))
    _tables: Tables = PrivateAttr(default_factory=lambda: Tables({}, {}))

    @classmethod
    def read(
        cls, source: str | Path | Mapping[str, Any], tables: tuple[Any, Any], overrides: Sequence[str] = ()
    ) -> Plan:
        """Read a YAML file, YAML text or a mapping of plain values, then apply `overrides` such as `target.threads=2`.

        `tables` are the passes and the exporters by name. Raises PlanError with every problem, those that `check`
        would find among them, if any keeps the plan from being built.
        """
        known = Tables(*tables)
        text = _parsed(source)
        if text.problems and text.value is None:
            raise PlanError(text.tell(text.problems))
        for assignment in overrides:
            text.override(assignment)
        parts = read_parts(text, known)
        if text.problems:
            # What could be built is checked as well, so that all is told at once.
            found = _problems({"model": None, **parts}, known)
            raise PlanError(text.tell(_without_echo(text.problems, found)))
        plan = cls(**parts)
        plan._source, plan._tables = text, known
        return plan

    def check(self) -> list[str]:
        """What can be known to be wrong before a weight is loaded, one line each; empty if the plan is fit."""
        return self._source.tell(_problems(dict(self), self._tables))

    def nodes(self) -> tuple[Node, ...]:
        """Every model the plan makes, in run order."""
        return expand(self.passes)

    @property
    def source(self) -> str:
        """The folder or hub name of the model; DataError where it names a package that isn't installed."""
        return locate(self.model or "")

    def written(self) -> dict[str, Any]:
        """The plan as plain values, without what is at its default."""
        values: dict[str, Any] = {"model": self.model, "task": self.task}
        for key, options in (("data", self.data), ("target", self.target)):
            if said := options.model_dump(mode="json", exclude_defaults=True):
                values[key] = said
        values["passes"] = [step.written() for step in self.passes]
        if "export" in self.model_fields_set:  # left unsaid in Python, it is for `read` to fill in the usual exporters
            values["export"] = [exporter.written() for exporter in self.export]
        return {key: value for key, value in {**values, "out": self.out}.items() if value is not None}

    def to_yaml(self) -> str:
        """The plan as YAML, from which `read` gives the same plan again."""
        return yaml.safe_dump(self.written(), sort_keys=False, allow_unicode=True, width=120)


def _parsed(source: str | Path | Mapping[str, Any]) -> Source:
    """The values behind a plan, or PlanError where there is no such file."""
    if isinstance(source, Mapping):
        return Source("plan", dict(source))
    if isinstance(source, str) and "\n" in source:
        return parse(source, "plan")
    try:
        return parse(Path(source).read_text(encoding="utf-8"), str(source))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PlanError([f"{source}: can't be read: {reason}; expected a YAML file"]) from error


def _problems(parts: Mapping[str, Any], tables: Tables) -> list[Problem]:
    """What is wrong with those parts of a plan that are there."""
    steps = parts.get("passes")
    if steps is None:
        return obstacles(parts)
    if not steps:
        return [*obstacles(parts), Problem(("passes",), "there is none; expected a list with at least one pass")]
    built = [Step(**step) if isinstance(step, dict) else step for step in steps]
    exports = [_needs(export) for export in parts.get("export") or ()]
    return [*obstacles(parts), *stages(built), *contradictions(built, tables.passes, exports)]


def _needs(export: Any) -> tuple[str, frozenset[Fact]]:
    """The name of an exporter and the facts that it needs, of one in a plan or of the fields of one."""
    built = Export(**export) if isinstance(export, dict) else export
    return built.name, getattr(built.do, "requires", frozenset())


def _without_echo(told: Sequence[Problem], found: Sequence[Problem]) -> list[Problem]:
    """Problems met when reading, and those found later that are not of the same cause."""
    blamed = [problem.path for problem in told if problem.path]
    return [*told, *(new for new in found if not any(new.path[: len(path)] == path for path in blamed))]
