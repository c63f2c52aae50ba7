"""Student beside teacher: runs both on a batch and weighs their losses, computing nothing that no loss reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from compress.errors import DataError, TrainingError
from compress.evaluate import embed
from compress.layout import record_of
from compress.state import State
from compress.stream import width_of
from passes.distillation.losses import LOSSES

HEAD, STATES = ("logits", "task"), ("hidden", "tokens", "embedding", "similarity")
SAME_WIDTH = ("hidden", "tokens", "embedding")  # losses that subtract states of the student from the teacher's
FAR_BELOW = -1e4  # a logit whose probability is zero in float32


class Comparison:
    """The weighted losses of a state's model against its teacher.

    Where no loss reads predictions, only the models below their heads are run; `student` is the part to train.
    """

    inputs: ClassVar[frozenset[str]] = frozenset({"input_ids", "attention_mask", "token_type_ids"})

    def __init__(self, weights: Mapping[str, float], state: State, temperature: float, epsilon: float) -> None:
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.settings = {"hidden": {"epsilon": epsilon}, "logits": {"temperature": temperature}}
        readers = [name for name in HEAD if name in self.weights]
        if readers and state.task.name == "feature-extraction":
            raise TrainingError(f"distill: loss '{readers[0]}' reads predictions, which feature-extraction has not")
        if not same_hidden_width(state) and (unlike := [name for name in SAME_WIDTH if name in self.weights]):
            mine, theirs = width_of(state.model.config), width_of(state.dense.model.config)
            instead = "similarity" if state.task.name == "feature-extraction" else "logits"
            raise TrainingError(
                f"distill: loss '{unlike[0]}' compares hidden states, of width {mine} here and {theirs} in the dense "
                f"model; expected a loss that needs no equal widths: {instead}"
            )
        teacher = state.teacher
        models: tuple[nn.Module, nn.Module] = (state.model, teacher)
        if not readers:
            models = (state.model.base_model, teacher.base_model)
        self.student, self.teacher = models
        self.extras: dict[str, Any] = {"output_hidden_states": any(name in self.weights for name in STATES)}
        if state.task.name == "text-generation":
            self.extras["use_cache"] = False

    def losses(self, student: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted losses of one batch by name; gradients go to the student only."""
        inputs = {name: tensor for name, tensor in batch.items() if name in self.inputs}
        labels = {name: tensor for name, tensor in batch.items() if name not in self.inputs}
        if "task" in self.weights and not labels:
            raise DataError("distill: loss 'task' reads labels, which the data has not; expected a label column")
        self.teacher.to(batch["input_ids"].device)
        with torch.no_grad():
            theirs = self.teacher(**inputs, **self.extras)
        mine = student(**inputs, **(labels if "task" in self.weights else {}), **self.extras)
        mask = batch["attention_mask"].bool()
        found = {}
        for name, weight in self.weights.items():
            if name == "task":
                found[name] = weight * mine.loss
                continue
            settings = self.settings.get(name, {})
            found[name] = weight * LOSSES[name](*self.views(name, mine, theirs, mask, labels), **settings)
        return found

    def mean(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """The sum of the weighted losses, averaged over the rows of some batches."""
        total, rows = 0.0, 0
        for batch in batches:
            placed = send_to_device(batch, next(self.student.parameters()).device)
            total += len(batch["input_ids"]) * float(sum(self.losses(self.student, placed).values()))
            rows += len(batch["input_ids"])
        if not rows:
            raise DataError("distill: the validation split is empty; expected at least one row")
        return total / rows

    def views(self, name: str, mine: Any, theirs: Any, mask: Tensor, labels: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """What the loss of that name takes: student's, teacher's and, where it has one, its mask."""
        if name == "logits":
            return _predictions(mine, mask), _predictions(theirs, mask), _rows(mine, mask, labels)
        if name in ("embedding", "similarity"):
            last = (BaseModelOutput(last_hidden_state=one.hidden_states[-1]) for one in (mine, theirs))
            return tuple(embed(one, mask) for one in last)
        places = self.places(len(mine.hidden_states) - 1, len(theirs.hidden_states) - 1)
        return mine.hidden_states[1:], [theirs.hidden_states[place] for place in places], mask

    def places(self, mine: int, theirs: int) -> list[int]:
        """For each of the student's blocks the place of the block it was among the teacher's hidden states.

        The last states are compared with the last whichever blocks they come from: both stand after the final norm.
        """
        left = _origins(self.student.config, mine)
        right = list(_origins(self.teacher.config, theirs))
        return [right.index(origin) + 1 for origin in left[:-1]] + [theirs]


def same_hidden_width(state: State) -> bool:
    """Whether the states of model and teacher can be compared channel by channel."""
    return width_of(state.model.config) == width_of(state.dense.model.config)


def _origins(config: Any, blocks: int) -> Sequence[int]:
    """Which blocks of the original model are left; all where none was dropped."""
    return next(iter(record_of(config)["blocks"].values()), range(blocks))


def _predictions(outputs: Any, mask: Tensor) -> Tensor:
    """Logits (..., classes); for question answering (batch, 2, sequence), the classes being the real tokens."""
    if "start_logits" not in outputs:
        return outputs.logits
    return torch.stack([outputs.start_logits, outputs.end_logits], 1).masked_fill(~mask[:, None], FAR_BELOW)


def _rows(outputs: Any, mask: Tensor, labels: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens' predictions count: those with a label where tokens have labels, all real ones otherwise."""
    if "start_logits" in outputs or outputs.logits.ndim == 2:
        return None
    return labels["labels"] != -100 if "labels" in labels else mask
