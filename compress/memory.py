"""Memory: how many weights there are, what they take, and giving back what exports and the C library hold on to."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def release() -> None:
    """Collect cycles, some of which hold a model's weights, and let glibc, if it is that, return its free pages."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def stored_bytes(model: nn.Module) -> int:
    """What the weights take, on disk as in memory; matrices that are one count once."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def stored_parameters(model: nn.Module) -> int:
    """How many learned numbers a model stores; matrices that are one count once.

    Packed layers tell it themselves, as `learned`: their zeros aren't stored, and the indices, bytes and scales that
    stand for the rest are nothing that was learned beside it. So packing changes the count by the zeros alone.
    """
    packed: list[Any] = [module for module in model.modules() if hasattr(module, "learned")]
    theirs = {id(one) for module in packed for one in module.parameters(recurse=False)}
    others = [one for one in model.parameters() if id(one) not in theirs]
    whole = sum(getattr(one, "quant_state", one).shape.numel() for one in others)  # bitsandbytes has two in a byte
    return whole + sum(module.learned for module in packed)
