"""What tables share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Figures = Mapping[str, Any]


def interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """A value with its 95 % interval."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def heading(*names: str) -> Iterator[str]:
    """The first two lines of a table with such columns."""
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
