"""Teach: run the dense model over the texts once and store what a recovery will ask of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.contract import PREDICTIONS, STATES, TEACHER, Fact, Pass
from compress.errors import TrainingError

if TYPE_CHECKING:
    from compress.state import State


class Teach(Pass):
    """Store the teacher's predictions, and hidden states, of all texts to train and to validate on, in the run's cache.

    A `distill` with `cached` recovers by them, without the teacher in memory. Predictions among few classes are stored
    whole. Of those over a vocabulary `samples` tokens are drawn, from which losses are estimated without bias, where
    the likeliest tokens alone would teach a student to be too sure. What is there already is not computed again.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({TEACHER})

    samples: int = Field(
        default=256, ge=0, le=2**14, description="tokens drawn from each prediction; as few classes are stored whole"
    )
    temperature: float = Field(default=1.0, gt=0, description="softens what is drawn from; that of the loss")
    proposal: float = Field(
        default=1.0, gt=0, description="softens what is drawn by, made up for by weights: above 1 for rarer tokens"
    )
    states: tuple[int, ...] = Field(
        default=(), description="blocks of the dense model after which states are stored; from the end where negative"
    )
    precision: Literal["float16", "bfloat16"] = Field(default="float16", description="of the stored states")
    batch_size: int = Field(default=16, ge=1, description="rows a batch")
    seed: int = Field(default=0, ge=0, description="of the draws")

    @property
    def provides(self) -> frozenset[Fact]:  # type: ignore[override]
        """What is stored."""
        stored = ((PREDICTIONS, self.samples > 0), (STATES, bool(self.states)))
        return frozenset(fact for fact, there in stored if there)

    @model_validator(mode="after")
    def _something(self) -> Teach:
        if not self.provides:
            raise ValueError("nothing is stored; expected samples above 0, or states such as [-1]")
        return self

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with the facts set; its model stays as it is.

        Raises TrainingError where texts are not the same each epoch, where there are no classes to predict or no such
        blocks, and where states are too large for their precision.
        """
        from compress.progress import track
        from passes.distillation import taught
        from passes.distillation.lesson import Lesson

        data, task = state.data, state.task
        if task.name == "fill-mask" or data.options.substitute:
            why = "data.substitute swaps words" if data.options.substitute else "fill-mask draws masks"
            raise TrainingError(f"teach: {why} anew each epoch; expected texts that stay, or distill without cached")
        if self.samples and task.name in ("feature-extraction", "question-answering"):
            raise TrainingError(f"teach: {task.name} has no classes to predict; expected samples: 0 and states")
        lesson = Lesson(self, state)
        made_of = [self.version, self.model_dump(exclude={"batch_size"}), lesson.identity, data.fingerprint]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:20]
        folder = state.workshop.run / "taught" / key
        plan = {
            path: (split, rows)
            for split in taught.SPLITS
            for path, rows in taught.shards(folder, split, taught.lengths_of(data, split)).items()
        }
        missing = [path for path in plan if not path.exists()]
        for path in track(missing, "teach", len(missing)):
            taught.write(path, lesson.shard(*plan[path]))
        fact: dict[str, Any] = {"folder": f"taught/{key}", "data": data.fingerprint, **lesson.told()}
        for given in self.provides:
            state.give(given, fact)
        tokens = sum(sum(taught.lengths_of(data, split)) for split in taught.SPLITS)
        stored = sum(path.stat().st_size for path in plan)
        state.figures = {"tokens": tokens, "bytes": stored, "shards": len(plan), "shards_written": len(missing)}
        yield state
