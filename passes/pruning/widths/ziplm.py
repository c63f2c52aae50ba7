"""ZipLM: structured optimal brain surgery, sized for a measured speed-up (Kurtic, Frantar, Alistarh 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.contract import STATISTICS, TEACHER, Fact
from passes.pruning.widths.structured import StructuredPruning

if TYPE_CHECKING:
    from compress.layout import Axis
    from compress.state import State
    from passes.pruning.widths.database import Curve, Fit


class ZipLM(StructuredPruning):
    """Remove the heads and columns that matter least, let the others make up for them, and meet the speed-up.

    `damping` is added to the diagonal of the Gram matrices as a share of its mean.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({STATISTICS, TEACHER})

    damping: float = Field(default=0.01, gt=0, le=1)

    def curves(self, state: State, axes: Sequence[Axis]) -> tuple[dict[str, Curve], Fit | None]:
        """The curves under optimal removals."""
        from passes.pruning.widths.database import surgery

        return surgery(state, axes, self.damping)
