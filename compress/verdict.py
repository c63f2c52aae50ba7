"""When an artifact is worth having: what it must win and may lose, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from compress.contract import Options

if TYPE_CHECKING:
    from compress.state import State


class KeepIf(Options):
    """What is asked of an artifact against the model it was made of, both measured on the target.

    `speedup` is the least that it must be as fast, and `max_drop` the most that the headline score may be worse, as a
    share of the model's own.
    """

    speedup: float | None = Field(default=None, gt=0, description="at least so many times as fast as unquantized")
    max_drop: float | None = Field(default=None, ge=0, description="headline score worse by this share at most")

    def verdict(
        self, ratio: float | None, metric: str, scores: tuple[float | None, float | None], lower_is_better: bool
    ) -> tuple[bool, str]:
        """Whether an artifact stays, and why.

        `ratio` is how many times as fast it is, and `scores` the model's and its own; None was not measured, and what
        is asked and not measured is not met.
        """
        said, kept = [], True
        if self.speedup is not None:
            kept &= ratio is not None and ratio >= self.speedup
            met = "speed not measured on this target" if ratio is None else f"{ratio:.3g}x as fast"
            said.append(f"{met}, {self.speedup:g}x asked")
        if self.max_drop is not None:
            before, after = scores
            if before is None or after is None:
                kept, met = False, "not measured"
            else:
                worse = (after - before if lower_is_better else before - after) / max(abs(before), 1e-12)
                kept &= worse <= self.max_drop
                met = f"{after:.4g} against {before:.4g}"
            said.append(f"{metric} {met}, {self.max_drop:.3g} of it may be lost")
        return kept, "; ".join(said)


class Fastest(Options):
    """What is asked of several artifacts of one model, of which one stays: the fastest whose quality is kept."""

    max_drop: float = Field(default=0.01, ge=0, description="headline score worse by this share at most")

    def candidates(self, state: State) -> Sequence[Options]:
        """The exporters to try for a model."""
        raise NotImplementedError
