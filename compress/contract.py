"""The contract between a plan and its passes: parts of a model, facts read from them, and the one-method Pass.

A pass never names another pass. It says which facts it needs, which it gives and which parts of the model it touches;
that a fact has gone stale is derived: it was read from a part that a later pass touched.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from compress.errors import ReachError
    from compress.state import State


class Part(enum.Flag):
    """What a pass may change in a model."""

    NONE = 0
    SHAPE = enum.auto()
    VALUES = enum.auto()
    FORMAT = enum.auto()


@dataclass(frozen=True)
class Fact:
    """Something known about a model, and the parts of the model it was read from, or the other facts it hangs on."""

    name: str
    read_from: Part
    meaning: str
    hangs_on: frozenset[Fact] = frozenset()


TEACHER = Fact("teacher", Part.NONE, "the dense model that recovery imitates and speed is compared with")
STATISTICS = Fact("statistics", Part.SHAPE | Part.VALUES, "Gram matrices of the inputs of the prunable projections")
VOCABULARY = Fact("vocabulary", Part.NONE, "the tokens of the dense model that are left, where some were dropped")
ROWS = Fact("rows", Part.NONE, "the rows that steps train on, where a step before them made or chose some")
GRID = Fact("grid", Part.SHAPE | Part.VALUES | Part.FORMAT, "the scales and zeros of the grid that weights lie on")
MASKS = Fact("masks", Part.SHAPE | Part.VALUES | Part.FORMAT, "which weights of sparse matrices are zero and stay so")
PREDICTIONS = Fact(
    "predictions",
    Part.NONE,
    "the dense model's predictions of the texts to learn from, stored by teach",
    frozenset({TEACHER, VOCABULARY, ROWS}),
)
STATES = Fact(
    "states",
    Part.NONE,
    "the dense model's hidden states on the texts to learn from, stored by teach with `states`",
    frozenset({TEACHER, VOCABULARY, ROWS}),
)

FACTS = {fact.name: fact for fact in (TEACHER, STATISTICS, VOCABULARY, GRID, MASKS, ROWS, PREDICTIONS, STATES)}

FLOAT = "float32"  # the number format of a model that was not quantized


class Options(BaseModel):
    """Options as they stand in a plan: frozen, and nothing unknown is taken.

    Their name there is that of their class in lower case, or `named` where that has several words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    named: ClassVar[str | None] = None


class Pass(Options):
    """One step of a plan: its fields are its YAML options, its class attributes its contract.

    A contract that depends on the options is written as a property of the same name. `version` goes into the cache
    key and is raised when a pass computes something else from the same options. A pass that `merges` may follow
    several steps, as many as it does not refuse. Where a run has several processes, they go through a pass `together`,
    or the main one does alone.
    """

    version: ClassVar[int] = 1
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    keeps: ClassVar[frozenset[Fact]] = frozenset()
    touches: ClassVar[Part] = Part.NONE
    merges: ClassVar[bool] = False
    together: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Files, folders and hub names that it reads beside the plan's, whose content its result depends on."""
        return ()

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the models it yields, in order; the empty name says that the branch goes on as it was."""
        return ("",)

    def refusal(self, models: int) -> str:
        """Why it can't take so many models; empty where it can."""
        return "" if models == 1 or self.merges else "takes one model; expected one name"

    def run(self, state: State) -> Iterator[State | ReachError]:
        """Yield one state per name in `branches`, or why there is none; the state given is the pass's own to change."""
        raise NotImplementedError
        yield state


def stale_after(step: Pass, facts: frozenset[Fact]) -> frozenset[Fact]:
    """Those of `facts` that no longer hold once `step` has run."""
    spoiled = (fact for fact in facts if fact.read_from & step.touches or fact.hangs_on & step.provides)
    return frozenset(fact for fact in spoiled if fact not in step.keeps | step.provides)
