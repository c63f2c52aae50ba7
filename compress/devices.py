"""Devices: work that only reads a model is done on the accelerator, where the machine has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def accelerated(model: nn.Module) -> Iterator[None]:
    """Inside, the model is on the accelerator; afterwards where it was."""
    home = next(model.parameters()).device
    model.to(torch.accelerator.current_accelerator(check_available=True) or home)
    try:
        yield
    finally:
        model.to(home)
