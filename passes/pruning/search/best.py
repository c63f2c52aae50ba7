"""The best that a search has met, and the way it took there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Found = TypeVar("Found")


@dataclass
class Best(Generic[Found]):
    """The candidate of lowest fitness among those offered, and after how many each new best one came."""

    value: Found
    fitness: float
    tried: int = 1
    history: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history.append((self.tried, self.fitness))

    def offer(self, value: Found, fitness: float) -> bool:
        """Take a candidate that is strictly better; says whether it was."""
        self.tried += 1
        if not fitness < self.fitness:
            return False
        self.value, self.fitness = value, fitness
        self.history.append((self.tried, fitness))
        return True
