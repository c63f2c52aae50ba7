"""Finetune: train a model with its head on labelled data; what comes out is the dense model of all that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import Field

from compress.contract import MASKS, TEACHER, Part, Pass
from compress.errors import TrainingError
from compress.recipe import TrainingOptions

if TYPE_CHECKING:
    from compress.state import State


class Finetune(TrainingOptions, Pass):
    """Train on the task's own loss and keep the weights with the best headline score on the validation split."""

    provides = frozenset({TEACHER})
    keeps = frozenset({MASKS})
    touches = Part.VALUES
    together = True

    learning_rate: float = Field(
        default=5e-5, gt=0, description="its peak; rises over `warmup`, then falls as a cosine to 0"
    )

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with the model trained, which from here on is the dense one too."""
        from compress.evaluate import evaluate, headline
        from compress.training import train

        data, task = state.data, state.task
        if task.name == "feature-extraction":
            raise TrainingError("finetune: feature-extraction has no loss of its own; expected a task with a head")

        def validate() -> float:
            _, score = headline(task, evaluate(state.model, data, task, split="validation", batch_size=self.batch_size))
            if task.lower_is_better:
                return score.value
            return 0.0 if math.isnan(score.value) else -score.value  # equal predictions correlate with nothing

        result = train(
            state.model,
            lambda epoch: data.batches("train", self.batch_size, seed=self.seed + epoch),
            lambda model, batch: model(**batch).loss,
            self,
            folder=state.workshop.step,
            total_steps=self.total_steps(data.count("train")),
            validate=validate,
            masks=state.facts.get(MASKS.name),
            what="finetune",
        )
        scores = evaluate(state.model, data, task, split="validation", batch_size=self.batch_size)
        state.figures |= {
            "scores": {name: asdict(score) for name, score in scores.items()},
            **result.figures(),
        }
        state.becomes_dense()
        yield state
