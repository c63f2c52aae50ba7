"""Healing folded blocks: low-rank deltas and norms are trained towards the teacher's last states and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.layout import own_record
from compress.lowrank import LowRank
from compress.recipe import TrainingOptions
from compress.sharing import cure_
from compress.state import State
from compress.training import train
from passes.distillation.compare import Comparison

VALIDATION_ROWS = 512


class Tail(Comparison):
    """Student beside teacher by their last states alone, whatever lies below; FoldGPT, arXiv:2407.00928."""

    def views(self, name: str, mine: Any, theirs: Any, mask: Tensor, labels: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """As any comparison, but for the states: those after the last block."""
        if name == "hidden":
            return mine.hidden_states[-1:], theirs.hidden_states[-1:], mask
        return super().views(name, mine, theirs, mask, labels)


def cure(state: State, blocks: Sequence[str], rank: int, recipe: TrainingOptions) -> dict[str, Any]:
    """Give `blocks` deltas of that rank, train them with the model's norms, and tell how it went.

    The deltas are zero at first, so the run starts from the shared model itself and ends no worse than that on the
    validation split. Blocks are named as in the base model.
    """
    data = state.data
    if data is None:
        raise DataError("fold: the plan has no data to cure with; expected some to train on, or cure: 0")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        cure_(state.model, own_record(state.model), dict.fromkeys(blocks, rank))
    weights = {"hidden": 1.0} if state.task.name == "feature-extraction" else {"hidden": 1.0, "logits": 1.0}
    compare = Tail(weights, state, temperature=1.0, epsilon=1e-8)
    rounds = max(1, VALIDATION_ROWS // recipe.batch_size)
    with _deltas_and_norms(state.model):
        trained = sum(one.numel() for one in state.model.parameters() if one.requires_grad)
        result = train(
            compare.student,
            lambda epoch: data.batches("train", recipe.batch_size, seed=recipe.seed + epoch),
            compare.losses,
            recipe,
            folder=state.workshop.step,
            total_steps=recipe.total_steps(data.count("train")),
            validate=lambda: compare.mean(islice(data.batches("validation", recipe.batch_size, seed=0), rounds)),
            what="cure",
        )
    compare.teacher.to(state.model.device)  # the comparison took it to where the training was
    return {
        "losses": weights,
        "loss_before": result.history[0]["validation"],
        "loss_after": result.best_score,
        "trained_parameters": trained,
        "steps": result.steps,
        "best_step": result.best_step,
        "training_seconds": result.seconds,
        "history": result.history,
    }


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
