"""A Linear at the end of a block, for residual streams whose axes are others in the next block.

A block becomes the subclass of its kind that has the shortcut: its modules keep their names, and whoever looks for a
block of its kind still finds one. SliceGPT, arXiv:2401.15024, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compress.errors import LayoutError


class Turning(nn.Module):
    """Mixed into a block whose states leave through `shortcut`."""

    shortcut: nn.Linear

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the block gives, turned; (batch, tokens, width) -> the same."""
        return self.shortcut(super().forward(*args, **kwargs))


KINDS: dict[type[nn.Module], type[Turning]] = {}  # subclasses made so far, by the kind of block


def add_shortcut_(block: nn.Module, width: int) -> None:
    """Give a block a shortcut (width, width)."""
    like, kind = next(block.parameters()), type(block)
    block.shortcut = nn.Linear(width, width, bias=False, device=like.device, dtype=like.dtype)
    block.__class__ = KINDS.setdefault(kind, type(f"Turning{kind.__name__}", (Turning, kind), {}))


def refuse_turning(record: Mapping[str, Any], what: str) -> None:
    """Raise LayoutError where blocks have shortcuts: what comes after one block fits no other."""
    if record.get("shortcuts"):
        raise LayoutError(
            f"{what}: met a model whose blocks have axes of their own, with shortcuts between them; expected this step "
            "before slice_hidden, or slice_hidden with one rotation"
        )
