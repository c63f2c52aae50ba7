"""What stands in a plan's lists: passes, exporters, and passes that are gone through for one speed-up after another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, field_validator, model_validator

from compress.contract import Options, Pass

GRADUAL: Literal["gradual"] = "gradual"
FILLED = "speedups"  # the option that a gradual step fills in


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


class Placed(BaseModel):
    """What has a place in the graph: it follows the step before it, or those in `after` (none: the dense model)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None = None
    after: tuple[str, ...] | None = None

    def beside(self) -> dict[str, Any]:
        """What stands beside the options in YAML."""
        said: dict[str, Any] = {"id": self.id} if self.id else {}
        return said if self.after is None else {**said, "after": list(self.after)}


class Step(Placed, Named):
    """A pass in a plan."""

    do: InstanceOf[Pass]

    def written(self) -> Any:
        """The step as it stands in a YAML plan, without what is at its default."""
        beside, written = self.beside(), super().written()
        return {**(written if isinstance(written, dict) else {written: None}), **beside} if beside else written


class Stages(Options):
    """A family of models in one go: for each speed-up the passes run again, on the model of the one before.

    The models differ in speed by `speedups`, all of them against the dense model; each leaves under the name of its
    speed-up.
    """

    speedups: tuple[Annotated[float, Field(ge=1)], ...] = Field(min_length=1, description="the targets, rising")
    passes: Any = Field(description="what is done for each; one of them takes the speed-up")

    @field_validator("speedups")
    @classmethod
    def _rising(cls, speedups: tuple[float, ...]) -> tuple[float, ...]:
        for one, two in pairwise(speedups):
            if two <= one:
                raise ValueError(f"{two:g} stands after {one:g}; expected rising speed-ups")
        return speedups


class Gradual(Stages, Placed):
    """Passes that are gone through once for each speed-up (gradual pruning; Kurtic et al., "ZipLM", 2023, section 4).

    `passes` are those for the first; the one that takes the speed-up is given each in turn.
    """

    name: Literal["gradual"] = GRADUAL
    passes: tuple[Step, ...] = Field(description="what is done for each; one of them takes the speed-up")

    @model_validator(mode="after")
    def _chain(self) -> Gradual:
        for _, problem in unfit(self.passes):
            raise ValueError(problem)
        return self

    def members(self) -> Iterator[tuple[str, tuple[Step, ...]]]:
        """The name of each model, empty where there is but one, and the passes that make it of the one before."""
        for speedup in self.speedups:
            label = f"{speedup:g}x" if len(self.speedups) > 1 else ""
            yield label, tuple(self._given(step, speedup) for step in self.passes)

    def written(self) -> Any:
        """The step as it stands in a YAML plan."""
        passes = [step.written() for step in self.passes]
        for index, step in enumerate(self.passes):
            if takes(type(step.do)):
                options = {name: value for name, value in passes[index][step.name].items() if name != FILLED}
                passes[index] = {step.name: options} if options else step.name
        return {self.name: {"speedups": list(self.speedups), "passes": passes}, **self.beside()}

    def _given(self, step: Step, speedup: float) -> Step:
        """The step with the speed-up filled in, if it takes one."""
        if not takes(type(step.do)):
            return step
        options = {**step.do.model_dump(exclude_unset=True), FILLED: (speedup,)}
        return step.model_copy(update={"do": type(step.do).model_validate(options)})


def takes(cls: type[BaseModel]) -> bool:
    """Whether a pass is told a speed-up."""
    return FILLED in cls.model_fields


def unfit(passes: Sequence[Step]) -> Iterator[tuple[int | None, str]]:
    """What keeps passes from being a gradual step's, with the number of the pass where it is one."""
    takers = [step.name for step in passes if takes(type(step.do))]
    if len(takers) != 1:
        met = f"{' and '.join(takers)} take {FILLED}" if takers else f"none of them takes {FILLED}"
        yield None, f"{met}; expected one pass that does"
    for index, step in enumerate(passes):
        if len(step.do.branches) > 1 and step.name not in takers:
            yield index, f"makes {len(step.do.branches)} models; expected passes that make one"
