"""Adapters: recovery that trains low-rank deltas of the linear layers alone and merges them when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.errors import TrainingError
from compress.lowrank import KINDS, LowRank, add_delta_, merge_delta_


@contextmanager
def adapted(model: nn.Module, rank: int, alpha: float, seed: int) -> Iterator[dict[str, str]]:
    """Inside, every linear layer has a low-rank delta, times alpha over rank, and nothing else is trained.

    Afterwards each is part of its weight, and the model is of the modules that it was. Yields which layers go without,
    and why. Raises TrainingError where all do.
    """
    found, skipped = _layers(model)
    if not found:
        raise TrainingError(f"distill: none of {len(skipped)} layers can take an adapter; expected no lora")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in found:
            add_delta_(layer, rank, alpha / rank)
    try:
        yield skipped
    finally:
        for layer in found:
            merge_delta_(layer)
        for parameter in trained:
            parameter.requires_grad_(True)


def _layers(model: nn.Module) -> tuple[list[Any], dict[str, str]]:
    """The linear layers that can take a delta, and the others by name with the reason."""
    uses = Counter(id(weight) for module in model.modules() if (weight := module._parameters.get("weight")) is not None)
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    found, skipped = [], {}
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            skipped[name] = "it has a low-rank delta of its own"
        elif type(module) not in KINDS:
            continue
        elif module is output:
            skipped[name] = "it is the head over the vocabulary"
        elif uses[id(module.weight)] > 1:
            skipped[name] = "its matrix is that of another layer as well"
        else:
            found.append(module)
    return found, skipped
