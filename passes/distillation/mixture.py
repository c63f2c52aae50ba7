"""Mixture: how much is trained of each of several corpora follows how far the student is from the teacher on it."""

from __future__ import annotations

from pydantic import Field

from compress.contract import Options


class Mixture(Options):
    """Corpora, which `data.domain` names, have the more of the training the further the student is from the teacher.

    They begin with their shares of the data. DDK (Liu et al., arXiv:2407.16154) mixes by that gap; how the shares
    follow it is dynamic batch loading (Xia et al., arXiv:2310.06694, algorithm 1).
    """

    updates: int = Field(default=10, ge=1, description="how often in a run the shares are set anew")
    rate: float = Field(default=1.0, gt=0, description="how fast they follow the gaps")
    rows: int = Field(default=32, ge=1, description="validation rows of each corpus looked at, its first ones")
