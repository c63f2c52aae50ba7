"""Memory: what weights take, and giving back what an export leaves in cycles and the C library keeps for later."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import TYPE_CHECKING

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
