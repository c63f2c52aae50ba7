"""Labels: values as they stand in a file, turned into class numbers or scores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress.errors import DataError, nearest


@dataclass(frozen=True)
class Labels:
    """The class names in the order of their numbers, or None where labels are scores."""

    names: tuple[str, ...] | None

    def number(self, value: Any, place: str) -> int | float:
        """Return the class number or score of a value; DataError, with its place, where there is none."""
        if self.names is None:
            score = as_number(value)
            if score is None:
                raise DataError(f"{place}: the label is {value!r}; expected a number")
            return float(score)
        if str(value) in self.names:
            return self.names.index(str(value))
        number = as_number(value)
        if not isinstance(number, int) or not 0 <= number < len(self.names):
            known = ", ".join(self.names[:20])
            raise DataError(f"{place}: the label is {value!r}; expected one of {known}{nearest(value, self.names)}")
        return number


def find_labels(values: Iterable[Any], names: tuple[str, ...] | None = None) -> Labels:
    """Tell classes from scores: whole numbers stay class numbers, decimals are scores, texts are sorted classes."""
    if names:
        return Labels(names)
    met = set(values)
    numbers = [as_number(value) for value in met]
    if any(number is None for number in numbers):
        return Labels(tuple(sorted(map(str, met))))
    if any(isinstance(number, float) for number in numbers):
        return Labels(None)
    highest = max(number for number in numbers if number is not None)
    return Labels(tuple(str(number) for number in range(int(highest) + 1)))


def as_number(value: Any) -> int | float | None:
    """Return a value as the whole number or finite decimal that it is or spells, else None."""
    if isinstance(value, bool | int):
        return int(value)
    for kind in (int, float):
        try:
            number = kind(value) if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            continue
        return number if math.isfinite(number) else None
    return None
