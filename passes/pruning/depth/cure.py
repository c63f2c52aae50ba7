"""Healing folded blocks: low-rank deltas and norms are trained towards the teacher's last states and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.errors import DataError
from compress.lowrank import LowRank
from compress.recipe import TrainingOptions
from compress.record import own_record
from compress.sharing import cure_
from compress.state import State
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison


def cure(state: State, blocks: Sequence[str], rank: int, recipe: TrainingOptions) -> dict[str, Any]:
    """Give `blocks` deltas of that rank, train them with the model's norms, and tell how it went.

    The deltas are zero at first, so the run starts from the shared model itself and ends no worse than that on the
    validation split. Blocks are named as in the base model.
    """
    if state.data is None:
        raise DataError("fold: the plan has no data to cure with; expected some to train on, or cure: 0")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        cure_(state.model, own_record(state.model), dict.fromkeys(blocks, rank))
    predictions = {} if state.task.name == "feature-extraction" else {"logits": 1.0}
    compare = Comparison(Losses.model_validate({"hidden": {"last": 1}, **predictions}), state)
    with _deltas_and_norms(state.model):
        trained = sum(one.numel() for one in state.model.parameters() if one.requires_grad)
        return {**compare.train(recipe, state.workshop.step, "cure"), "trained_parameters": trained}


@contextmanager
def _deltas_and_norms(model: nn.Module) -> Iterator[None]:
    """Let gradients reach the low-rank deltas and the norms alone, inside."""
    asked = {name: one.requires_grad for name, one in model.named_parameters()}
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LowRank):
            module.down.requires_grad_(True)
            module.up.requires_grad_(True)
        elif (weight := module._parameters.get("weight")) is not None and weight.ndim == 1:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    try:
        yield
    finally:
        for name, one in model.named_parameters():
            one.requires_grad_(asked[name])
