"""Gives memory back to the system: what an export leaves in cycles, and what the C library keeps for later."""

from __future__ import annotations

import ctypes
import gc


def release() -> None:
    """Collect cycles, some of which hold a model's weights, and let glibc, if it is that, return its free pages."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
