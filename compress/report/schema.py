"""What report.json holds: a documented, versioned description, and the check that a report keeps to it.

Three words hold everywhere. A figure that was not measured is ``null``, never a guess. An interval is ``[low, high]``
at 95 %. A key that this version doesn't know is kept in report.json and not shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from compress.contract import FLOAT
from compress.errors import DataError

VERSION = 1
Interval = tuple[float, float]


class Record(BaseModel):
    """A part of the report: frozen, finite numbers only, further keys kept."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, populate_by_name=True)


class Figures(Record):
    """What a step wants told; two keys have a meaning, the others are shown as they are."""

    skipped: dict[str, str] = Field(default_factory=dict, description="what was left as it was -> the reason")
    warnings: list[str] = Field(default_factory=list, description="sentences that a reader of the figures must know")


class Step(Record):
    """One pass as it ran in a branch."""

    name: str = Field(alias="pass", description="the pass, as named in the plan")
    options: dict[str, JsonValue] = Field({}, description="its options, defaults included")
    seconds: float | None = Field(
        None, ge=0, description="what it took when it ran, also where a later run took it from the cache"
    )
    kept: bool = Field(True, description="whether its result was taken over")
    reason: str | None = Field(None, description="why it was kept or rejected")
    figures: Figures = Field(default_factory=Figures)


class Speed(Record):
    """What is told alike of a branch and of an artifact."""

    measured_speedup: float | None = Field(None, gt=0, description="ratio of medians to the dense artifact")
    measured_low: float | None = None
    measured_high: float | None = None
    quality: dict[str, float | None] = Field({}, description="metric -> value on held-out data")
    quality_interval: dict[str, Interval | None] = {}

    @property
    def measured_interval(self) -> Interval | None:
        """The interval of the measured speed-up, where both of its ends are known."""
        if self.measured_low is None or self.measured_high is None:
            return None
        return self.measured_low, self.measured_high


class Factors(Record):
    """What a speed-up against the dense model in the target's runtime is the product of."""

    runtime: float = Field(gt=0, description="the dense model in the artifact's runtime")
    structure: float = Field(gt=0, description="the branch's model in float32 against the dense one, there")
    precision: float = Field(gt=0, description="the artifact against the branch's model in float32, there")


class Artifact(Speed):
    """A file or folder that leaves the run, compared with its model, and judged by itself, in its own runtime."""

    kind: str = Field(description="the exporter")
    path: str = Field(description="where it was written")
    bytes: int = Field(ge=0)
    sha256: str
    worst_error: float | None = Field(None, ge=0, description="largest difference of an output; 0: equal to the bit")
    precision: str = Field(FLOAT, description="number format of its weights")
    figures: Figures = Field(default_factory=Figures, description="what its exporter tells of it")
    runtime: str | None = Field(None, description="what it was timed in")
    milliseconds: float | None = Field(None, gt=0, description="median latency; null where it was not timed")
    factors: Factors | None = Field(None, description="what the speed-up is made of")
    kept: bool = Field(True, description="whether it paid, where that was asked")
    reason: str | None = Field(None, description="why it was kept or put aside")


class Axis(Record):
    """A prunable width, and which of its units are left."""

    name: str
    kind: str = Field(description="heads or columns")
    block: str = Field("", description="the transformer block; empty where blocks share the axis")
    dense: int = Field(ge=0, description="units of the dense model")
    kept: list[int] = Field(description="indices, in the dense model, of the units left; none: module removed")

    @model_validator(mode="after")
    def within_the_dense_model(self) -> Axis:
        """Refuse units that the dense model doesn't have, or that are told twice."""
        strange = sorted({unit for unit in self.kept if not 0 <= unit < self.dense})
        if strange or len(set(self.kept)) < len(self.kept):
            met = f"{strange}" if strange else "a unit twice"
            raise ValueError(f"axis '{self.name}' keeps {met}; expected distinct units of 0..{self.dense - 1}")
        return self


class Timing(Record):
    """How a latency was measured."""

    low: float = Field(gt=0, description="milliseconds; lower end of the median's interval")
    high: float = Field(gt=0, description="milliseconds; upper end of the median's interval")
    quantised: bool = Field(False, description="whether the times snap to steps, and so doubt the median")
    waited: float | None = Field(None, ge=0, description="share of the time spent in line for a core that others had")
    crowded: bool = Field(False, description="whether that was so much that times may be too long")


class Measured(Record):
    """What is told alike of the dense model and of every branch."""

    parameters: int | None = Field(None, ge=0, description="learned numbers; zeros that aren't stored aren't counted")
    bytes: int | None = Field(None, ge=0, description="size of its tensors")
    milliseconds: float | None = Field(None, gt=0, description="median latency on the target")
    tokens_per_second: float | None = Field(
        None, gt=0, description="new tokens over the time of whole requests; null where the target generates none"
    )
    timing: Timing | None = None
    quality: dict[str, float | None] = Field({}, description="metric -> value on held-out data")
    quality_interval: dict[str, Interval | None] = {}
    quality_other: dict[str, float | None] = Field({}, description="the same on held-out data of another domain")
    quality_other_interval: dict[str, Interval | None] = {}
    warnings: list[str] = Field([], description="doubts about the figures")


class Branch(Measured, Speed):
    """One compressed model."""

    name: str
    promised_speedup: float | None = Field(None, gt=0, description="null where none was asked for")
    met: bool | None = Field(None, description="whether the promise was kept; null where none was made")
    cause: str | None = Field(None, description="why a promise was missed")
    quality_before_recovery: dict[str, float | None] = {}
    quality_before_recovery_interval: dict[str, Interval | None] = {}
    quality_before_recovery_other: dict[str, float | None] = {}
    quality_before_recovery_other_interval: dict[str, Interval | None] = {}
    layers: dict[str, float | None] = Field(
        {}, description="block, by its dense name -> linear CKA of its output with the dense block's; null: constant"
    )
    artifacts: list[Artifact] = []
    refused: dict[str, str] = Field({}, description="what was tried and could not be made or timed -> the reason")
    steps: list[Step] = []
    axes: list[Axis] = []


class Missed(Record):
    """A model that was asked for and is not there, as no model keeps its budget."""

    name: str = Field(description="the branch that would have been of it")
    reason: str
    fastest: float | None = Field(None, gt=0, description="times as fast that is in reach; null: of another budget")


class Report(Record):
    """A whole run."""

    version: Literal[1] = Field(alias="schema", description="version of this description")
    environment: dict[str, JsonValue] = Field({}, description="machine, versions, and the target with `auto` resolved")
    plan: dict[str, JsonValue] | str = Field(description="the plan as it ran, defaults included, or its text")
    headline: str | None = Field(None, description="metric that the pictures show; else the baseline's first")
    seconds: float | None = Field(None, ge=0, description="the whole run")
    baseline: Measured
    branches: list[Branch]
    out_of_reach: list[Missed] = []

    @field_validator("plan")
    @classmethod
    def readable(cls, plan: dict[str, JsonValue] | str) -> dict[str, JsonValue] | str:
        """Refuse a plan that is text but not YAML."""
        if isinstance(plan, str):
            try:
                yaml.safe_load(plan)
            except yaml.YAMLError as error:
                raise ValueError(f"not YAML: {error}") from error
        return plan

    @property
    def planned(self) -> dict[str, JsonValue]:
        """The plan as a table; empty where it isn't one."""
        plan = yaml.safe_load(self.plan) if isinstance(self.plan, str) else self.plan
        return plan if isinstance(plan, dict) else {}


def check(report: Mapping[str, Any]) -> Report:
    """Read a report, telling every place where it doesn't keep to the schema; raises DataError."""
    try:
        return Report.model_validate_json(json.dumps(report))
    except TypeError as error:
        raise DataError(f"report: only JSON values can be told, but {error}") from error
    except ValidationError as error:
        problems = [f"report.{place(found['loc'])}: {found['msg']}" for found in error.errors()]
        raise DataError("\n".join(problems)) from error


def place(path: tuple[int | str, ...]) -> str:
    """Write a path into nested data as in Python: ``branches[0].axes[2].kept``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
