"""What stands in a plan's lists: passes, exporters, and passes that are gone through for one target after another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compress.contract import Options, Pass
from compress.verdict import KeepIf

GRADUAL: Literal["gradual"] = "gradual"
FILLED = "speedups"  # the option that a gradual step fills in, unless it raises the share of zeros


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
    """A pass in a plan; with `keep_if` its model is taken only where it pays, and else the one before goes on."""

    do: InstanceOf[Pass]
    keep_if: KeepIf | None = None

    def key_material(self) -> str:
        """Everything of this step that its result depends on, as JSON for a cache key."""
        asked = self.keep_if.model_dump_json() if self.keep_if else ""
        return super().key_material() + asked

    def beside(self) -> dict[str, Any]:
        """What stands beside the options in YAML."""
        asked = {"keep_if": self.keep_if.model_dump(exclude_defaults=True)} if self.keep_if else {}
        return {**super().beside(), **asked}

    def written(self) -> Any:
        """The step as it stands in a YAML plan, without what is at its default."""
        beside, written = self.beside(), super().written()
        return {**(written if isinstance(written, dict) else {written: None}), **beside} if beside else written


class Cubic(Options):
    """Shares of zeros that rise fast at first, in so many `stages` along a cubic that is flat at its end.

    Zhu & Gupta, "To prune, or not to prune", 2017 (arXiv:1710.01878), equation 1.
    """

    first: float = Field(gt=0, lt=1)
    last: float = Field(gt=0, lt=1)
    stages: int = Field(ge=2)

    def shares(self) -> tuple[float, ...]:
        """The share of each stage, to four digits."""
        left = [(1 - stage / (self.stages - 1)) ** 3 for stage in range(self.stages)]
        return tuple(round(self.last + (self.first - self.last) * part, 4) for part in left)


Shares = tuple[Annotated[float, Field(gt=0, lt=1)], ...]


def listed(given: Any) -> Any:
    """The shares of a cubic in a list; of anything else, itself."""
    return Cubic.model_validate(given).shares() if isinstance(given, Mapping) else given


class Stages(Options):
    """A family of models in one go: for each target the passes run again, on the model of the one before.

    The models differ in speed by `speedups`, all of them against the dense model, or in their share of zeros by
    `sparsities`; each leaves under the name of its target, or with `deliver` the last alone.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [one]} for one in ("speedups", "sparsities")]})

    speedups: tuple[Annotated[float, Field(ge=1)], ...] | None = Field(
        default=None, min_length=1, description="the targets, rising"
    )
    sparsities: Annotated[Shares | None, BeforeValidator(listed, json_schema_input_type=Shares | Cubic)] = Field(
        default=None, min_length=1, description="shares of zeros in place of speed-ups, rising, or along a cubic"
    )
    passes: Any = Field(description="what is done for each; one of them takes the target")
    deliver: Literal["all", "last"] = Field(
        default="all", description="which models leave, or are gone on from; last: the others are only on the way to it"
    )

    @field_validator("speedups", "sparsities")
    @classmethod
    def _rising(cls, targets: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        for one, two in pairwise(targets or ()):
            if two <= one:
                what = {"speedups": "speed-ups"}.get(str(info.field_name), info.field_name)
                raise ValueError(f"{two:g} stands after {one:g}; expected rising {what}")
        return targets

    @model_validator(mode="after")
    def _one_kind(self) -> Stages:
        if bool(self.speedups) == bool(self.sparsities):
            met = "both speedups and sparsities are" if self.speedups else "neither speedups nor sparsities is"
            raise ValueError(f"{met} given; expected one of them")
        return self

    @property
    def filled(self) -> str:
        """The option of the pass that takes the target."""
        return FILLED if self.speedups else "sparsity"

    @property
    def targets(self) -> dict[str, Any]:
        """What is filled in for each model, by the name that it has for it."""
        return {
            **{f"{speedup:g}x": (speedup,) for speedup in self.speedups or ()},
            **{f"sparse-{share:g}": share for share in self.sparsities or ()},
        }


class Gradual(Stages, Placed):
    """Passes that are gone through once for each target (gradual pruning; Kurtic et al., "ZipLM", 2023, section 4).

    `passes` are those for the first; the one that takes the target is given each in turn.
    """

    name: Literal["gradual"] = GRADUAL
    passes: tuple[Step, ...] = Field(description="what is done for each; one of them takes the target")

    @model_validator(mode="after")
    def _chain(self) -> Gradual:
        for _, problem in unfit(self.passes, self.filled):
            raise ValueError(problem)
        return self

    def members(self) -> Iterator[tuple[str, bool, tuple[Step, ...]]]:
        """Of each model its name, whether it is delivered, and the passes that make it of the one before.

        One that is delivered alone has no name.
        """
        *_, last = self.targets
        alone = self.deliver == "last" or len(self.targets) == 1
        for label, target in self.targets.items():
            passes = tuple(self._given(step, target) for step in self.passes)
            yield "" if alone and label == last else label, not alone or label == last, passes

    def written(self) -> Any:
        """The step as it stands in a YAML plan."""
        passes = [step.written() for step in self.passes]
        for index, step in enumerate(self.passes):
            if takes(type(step.do), self.filled) and isinstance(passes[index], dict):
                options = {name: value for name, value in passes[index][step.name].items() if name != self.filled}
                passes[index] = {step.name: options} if options else step.name
        said = self.model_dump(mode="json", include={"speedups", "sparsities", "deliver"}, exclude_defaults=True)
        return {self.name: {**said, "passes": passes}, **self.beside()}

    def _given(self, step: Step, target: Any) -> Step:
        """The step with the target filled in, if it takes one."""
        if not takes(type(step.do), self.filled):
            return step
        options = {**step.do.model_dump(exclude_unset=True), self.filled: target}
        return step.model_copy(update={"do": type(step.do).model_validate(options)})


def takes(cls: type[BaseModel], filled: str) -> bool:
    """Whether a pass is told a target by the option of that name."""
    return filled in cls.model_fields


def unfit(passes: Sequence[Step], filled: str) -> Iterator[tuple[int | None, str]]:
    """What keeps passes from being a gradual step's, with the number of the pass where it is one."""
    takers = [step.name for step in passes if takes(type(step.do), filled)]
    if len(takers) != 1:
        met = f"{' and '.join(takers)} take {filled}" if takers else f"none of them takes {filled}"
        yield None, f"{met}; expected one pass that does"
    for index, step in enumerate(passes):
        if len(step.do.branches) > 1 and step.name not in takers:
            yield index, f"makes {len(step.do.branches)} models; expected passes that make one"
