"""Runs: the batches of a split through a model and its teacher, and what is alike between their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compress.data import Data
from compress.evaluate.metrics import Columns, Measure
from compress.progress import track

Batch = Mapping[str, Tensor]
BINS = 15  # of confidence, as Guo et al. have them (arXiv:1706.04599)
Measured = tuple[Columns, dict[str, Measure]]  # numbers per row, and the scores to take from them


@dataclass(frozen=True)
class Run:
    """What goes through a model, and a teacher where there is one, in one evaluation."""

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    data: Data
    split: str
    batch_size: int

    def columns(self, measure: Callable[[Sequence[int], Batch, Any, Any], dict[str, Tensor]]) -> dict[str, np.ndarray]:
        """Join what `measure(numbers, batch, outputs, teacher's)` gives per sequence, in their order."""
        order = self.data.order(self.split, self.batch_size)
        parts: list[dict[str, Tensor]] = []
        for numbers in track(order, "evaluating", len(order)):
            batch = {name: part.to(self.model.device) for name, part in self.data.batch(self.split, numbers).items()}
            parts.append(measure(numbers, batch, self.forward(self.model, batch), self.forward(self.teacher, batch)))
        places = np.argsort(np.concatenate(order))
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy()[places] for name in parts[0]}

    def forward(self, model: PreTrainedModel | None, batch: Batch) -> Any:
        """The outputs of a model for a batch without its labels; None of no model."""
        if model is None:
            return None
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
        extras = {"use_cache": False} if self.data.task.name == "text-generation" else {}
        return model(**{name: batch[name].to(model.device) for name in names}, **extras)


def embed(outputs: Any, attention_mask: Tensor) -> Tensor:
    """Mean of the last hidden states (batch, length, hidden) over real tokens, scaled to length 1: (batch, hidden)."""
    mask = attention_mask.unsqueeze(-1).to(outputs.last_hidden_state.dtype)
    mean = (outputs.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
    return functional.normalize(mean, dim=-1)


class Likeness(NamedTuple):
    """How alike predictions are: label and probability loyalty of Xu et al. (arXiv:2109.03228), and KL in nats.

    `agrees` says whether the likeliest class is the teacher's, `loyalty` is ``1 - sqrt(JS)`` with the Jensen-Shannon
    divergence in bits, so that it is 1 for equal and 0 for disjoint predictions.
    """

    agrees: Tensor
    divergence: Tensor
    loyalty: Tensor


def likeness(logits: Tensor, taught: Tensor) -> Likeness:
    """How alike logits (..., classes) are to the teacher's; each over the last axis."""
    ours, theirs = logits.float().log_softmax(-1), taught.to(logits.device).float().log_softmax(-1)
    agrees, divergence = (ours.argmax(-1) == theirs.argmax(-1)).float(), (theirs.exp() * (theirs - ours)).sum(-1)
    both = ours.double(), theirs.double()  # the root of a rounding error in float32 is 1e-4
    middle = torch.logaddexp(*both) - math.log(2)
    bits = sum((one.exp() * (one - middle)).sum(-1) for one in both) / math.log(4)
    return Likeness(agrees, divergence, 1 - torch.as_tensor(bits).clamp(0, 1).sqrt().float())


def overconfidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Confidence less correctness of each prediction, in the bin of its confidence: (rows, classes) -> (rows, bins)."""
    confidence, chosen = logits.float().softmax(-1).max(-1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = confidence - (chosen == labels).float()
    return functional.one_hot(bins, BINS) * gap[:, None]


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of every module is put back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # inference mode would mark what a model in shares gathers, and trains by next
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
