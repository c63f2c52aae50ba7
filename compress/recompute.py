"""Blocks computed anew in the backward pass: their activations are not kept, which is most of what training holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from compress.errors import TrainingError


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, the blocks of a transformers model keep nothing but what enters them.

    transformers' own switch works in training mode only, that is with dropout. Raises TrainingError where a model has
    no such blocks.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise TrainingError(
            f"recompute: {type(model).__name__} has no blocks to compute anew; expected recompute: false"
        )
    for block in blocks:
        block.forward = partial(_anew, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _anew(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a block and let the backward pass call it again; without a cache, which that would lengthen twice."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    given = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    return checkpoint(partial(forward, **given), *args, use_reentrant=False)
