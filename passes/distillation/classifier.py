"""What a classifier reads: the input of the layer that writes the logits, wherever a family's head has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from compress.data import Data
from compress.errors import TrainingError
from compress.processes import accelerator
from compress.statistics import frozen
from compress.training import Batch
from passes.distillation.losses.base import Sample, Seen

ROWS = 32  # texts that are looked at together


def classifier_of(model: Any) -> nn.Linear:
    """The last linear layer of a model's head with as many outputs as there are classes; TrainingError without one."""
    inner = set(model.base_model.modules()) if model.base_model is not model else set()
    found = [one for one in model.modules() if isinstance(one, nn.Linear) and one not in inner]
    classes = int(model.config.num_labels)
    fitting = [one for one in found if one.out_features == classes]
    if not fitting or classes < 2:
        raise TrainingError(
            f"distill: {type(model).__name__} has no linear classifier, over {classes} classes, whose input could be "
            "read; expected one, over two or more"
        )
    return fitting[-1]


@contextmanager
def read_by(classifier: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside, collect what a classifier reads."""
    found: list[Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        hook.remove()


def features(read: Tensor, predictions: Tensor, mask: Tensor) -> Tensor:
    """What was read (..., width) of each row of predictions (..., classes).

    Where the classifier reads each token (batch, sequence, width) and the text has one prediction (batch, classes), it
    is that of the last real token.
    """
    if read.ndim == predictions.ndim:
        return read
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return read[torch.arange(len(read), device=read.device), last]


def sample_of(show: Callable[[Batch], Seen], model: Any, classifier: nn.Linear, data: Data, texts: int) -> Sample:
    """What a classifier reads, and makes of it, of so many training texts; `show` runs the model on a batch."""
    home, device = model.device, accelerator().device
    model.to(device)
    try:
        with frozen(model):
            batches = islice(data.batches("train", ROWS, seed=0), -(-texts // ROWS))
            seen = [show(send_to_device(batch, device)) for batch in batches]
            parts = ((one.read.cpu(), one.logits.cpu()) for one in seen)
            read, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    finally:
        model.to(home)
    return Sample(read, logits, classifier.weight.detach().float().cpu())
