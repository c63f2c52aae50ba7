"""Mixing: batches of several corpora, whose shares stand beside the model, so that a killed run has them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from compress.data import Data
from compress.data.batches import cut
from compress.errors import DataError
from compress.training import Batch
from passes.distillation.mixture import Mixture

LEAST = 1e-4  # what all corpora share alike whatever their gaps, so that none is forgotten


class Mixing(nn.Module):
    """The shares of the corpora so far, and the next batch by them.

    `gap` gives the mean loss over batches of validation rows, `done` the share of the run that is done. What it does
    hangs on these and on torch's random numbers, which training seeds for every batch.
    """

    shares: Tensor
    updated: Tensor

    def __init__(
        self, how: Mixture, data: Data, gap: Callable[[Iterable[Batch]], float], done: Callable[[], float]
    ) -> None:
        super().__init__()
        self.how, self.data, self.gap, self.done = how, data, gap, done
        self.rows, self.held = data.domains("train"), data.domains("validation")
        if len(self.rows) < 2:
            raise DataError(
                "distill: mixture needs several corpora; expected data.domain to name a column with two or more values"
            )
        if missing := [name for name in self.rows if name not in self.held]:
            raise DataError(f"distill: mixture: no row of '{missing[0]}' is left for validation; expected some")
        counts = torch.tensor([len(numbers) for numbers in self.rows.values()], dtype=torch.float64)
        self.register_buffer("shares", counts / counts.sum())
        self.register_buffer("updated", torch.zeros((), dtype=torch.int64))

    def turn(self, batch: Batch) -> Batch:
        """A batch as large as the given one, its rows drawn from one corpus, which is drawn by the shares."""
        size, home = len(batch["input_ids"]), batch["input_ids"].device
        if int(self.done() * self.how.updates) >= int(self.updated):
            gaps = torch.tensor([self.gap(self.validation(name, size)) for name in self.rows], dtype=torch.float64)
            self.shares.copy_(reweighed(self.shares.cpu(), gaps, self.how.rate))
            self.updated += 1
        corpus = list(self.rows.values())[int(torch.multinomial(self.shares.cpu(), 1))]
        drawn = [corpus[place] for place in torch.randint(len(corpus), (size,)).tolist()]
        return send_to_device(self.data.batch("train", drawn, seed=int(torch.randint(2**31, ()))), home)

    def validation(self, name: str, size: int) -> Iterable[Batch]:
        """The validation rows of a corpus, in batches of `size`."""
        return (self.data.batch("validation", part, seed=0) for part in cut(self.held[name][: self.how.rows], size))

    def figures(self) -> Mapping[str, float]:
        """The share of each corpus."""
        return dict(zip(self.rows, self.shares.tolist(), strict=True))


def reweighed(shares: Tensor, gaps: Tensor, rate: float) -> Tensor:
    """Shares (corpora,) after a step of exponentiated gradient ascent on the gaps."""
    grown = (shares.log() + rate * gaps).softmax(0)
    return (1 - LEAST) * grown + LEAST / len(grown)
