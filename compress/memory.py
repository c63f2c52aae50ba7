"""Gives memory back to the system: what an export leaves in cycles, and what the C library keeps for later."""

from __future__ import annotations

import ctypes
import gc
import sys


def release() -> None:
    """Collect cycles, some of which hold a model's weights, and let glibc, if it is that, return its free pages."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
