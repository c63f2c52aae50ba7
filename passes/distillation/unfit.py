"""What a loss can't be taken of, told before anything is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.errors import TrainingError
from compress.state import State
from compress.stream import width_of
from passes.distillation.losses import LOSSES, Loss
from passes.distillation.losses.base import Reads
from passes.distillation.pairs import places, same_hidden_width
from passes.distillation.teachers import Ensemble

HEAD = Reads.PREDICTIONS | Reads.LABELS
INSIDE = Reads.STATES | Reads.ATTENTION | Reads.FEATURES


def refuse_unfit(state: State, name: str, loss: Loss, loaded: bool) -> None:
    """Raise TrainingError where task, teachers or widths are not such as the loss compares.

    `loaded` says that the teacher is, and is not asked through what it has stored.
    """
    bare = state.task.name == "feature-extraction"
    if bare and loss.reads & HEAD:
        raise TrainingError(f"distill: loss '{name}' reads predictions, which feature-extraction has not")
    if loss.across and not state.task.generates:
        raise TrainingError(
            f"distill: loss '{name}' compares what language models expect of a text; expected text-generation, "
            f"not {state.task.name}"
        )
    if loss.tasks and state.task.name not in loss.tasks:
        raise TrainingError(
            f"distill: loss '{name}' is for {', '.join(loss.tasks)}; met {state.task.name}, expected one of those"
        )
    if loaded and isinstance(state.dense.model, Ensemble) and loss.reads & INSIDE:
        raise TrainingError(
            f"distill: loss '{name}' looks into one teacher, and there are several; expected losses of predictions"
        )
    if loss.same_width and not same_hidden_width(state):
        mine, theirs = width_of(state.model.config), width_of(state.dense.config)
        raise TrainingError(
            f"distill: loss '{name}' compares hidden states, of width {mine} here and {theirs} in the dense "
            f"model; expected a loss that needs no equal widths: {'similarity' if bare else 'logits'}, or "
            f"{name}: {{project: true}}"
        )


def refuse_untaught(state: State, name: str, loss: Loss, fact: Mapping[str, Any]) -> None:
    """Raise TrainingError where a loss asks the teacher for more than is stored, which `fact` tells."""
    told = f"distill: loss '{name}'"
    if loss.reads & Reads.STATES:
        found = places(state, list(state.layout.stacks.values())[-1].length, fact["blocks"])
        asked = found[-(loss.depth or 0) :]
        if not set(asked) <= set(fact["states"]):
            raise TrainingError(f"{told} compares states after blocks {asked}; stored are {fact['states']}")
    if not (loss.reads & Reads.PREDICTIONS and fact["drawn"]):
        return
    if not (loss.drawn and loss.by_rows):
        able = ", ".join(one for one, cls in LOSSES.items() if cls.drawn)
        raise TrainingError(
            f"{told} needs all of a prediction, and stored are tokens drawn from it; expected one of {able}, "
            "each with keep at 1, or no cached"
        )
    if (softness := getattr(loss, "temperature", 1.0)) != fact["temperature"]:
        raise TrainingError(
            f"{told} has the temperature {softness:g}, and what is stored was drawn at "
            f"{fact['temperature']:g}; expected the same"
        )
