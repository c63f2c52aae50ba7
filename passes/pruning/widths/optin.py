"""OPTIN: prune by how far the model strays when a part is masked, without training (arXiv:2403.17921)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from passes.pruning.widths.structured import StructuredPruning

if TYPE_CHECKING:
    from compress.layout import Axis
    from compress.state import State
    from passes.pruning.widths.database import Curve, Fit


class Optin(StructuredPruning):
    """Remove the heads and columns whose masking changes the later blocks' states and the output least.

    Importances are taken to add up, as in the paper, so the search sums them up by default (`prior` ``loss``); what
    stays is left as it is. Measuring takes a run of the model for each head and each group of columns: columns are put
    in the order of their activations' magnitude times the norm of the weights that read them, and masked by groups.
    """

    prior: Literal["sensitivity", "relative", "loss"] = Field(
        default="loss", description="what the search sums up: loss, the importances; the others as for all pruning"
    )
    samples: int = Field(default=64, ge=1, description="texts of the calibration split")
    batch_size: int = Field(default=8, ge=1, description="texts that are run at once")
    groups: int = Field(default=16, ge=1, description="groups of columns of a feed-forward layer, masked in turn")

    def curves(self, state: State, axes: Sequence[Axis]) -> tuple[dict[str, Curve], Fit | None]:
        """The curves by importance; nothing is refitted."""
        from compress.data.calibration import calibration
        from passes.pruning.widths.trajectory import trajectory_curves

        batches = list(calibration(state.data, self.samples, self.batch_size))
        return trajectory_curves(state.model, state.layout, axes, batches, self.groups), None
