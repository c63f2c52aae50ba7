"""Fitness: how far a model with all of its axes at given sizes is from the model as it was, on calibration text.

What the readers of an axis become depends on that axis' size alone. So the weights for an axis at a size are computed
once, when first asked for, and models of any sizes are stitched from them in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.layout import Layout
from compress.statistics import frozen
from passes.pruning.widths.database import Curve, Fit, silence_
from passes.pruning.widths.sensitivity import Output, change, restored

HELD = 2**32  # bytes of reader weights that are kept; the longest unused go first


class Fitness:
    """The change of a model's `output` when its axes are silenced, and refitted where there is a `fit`, to sizes.

    The model is as it was after every call, and what was judged once is remembered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        curves: Mapping[str, Curve],
        fit: Fit | None,
        batches: Sequence[dict[str, Tensor]],
        output: Output,
    ) -> None:
        self.model, self.layout, self.curves, self.fit = model, layout, curves, fit
        self.batches, self.output = batches, output
        self.known: dict[tuple[tuple[int, ...], int], float] = {}
        self.stitches: dict[tuple[str, int], list[Tensor]] = {}
        self.readers = {name: [site.module for site in layout.axis(name).readers] for name in curves}
        with frozen(model):
            self.before = [output.read(model, batch) for batch in batches]

    def __call__(self, sizes: Mapping[str, int], share: float = 1.0) -> float:
        """The mean change over tokens at `sizes`, by the first `share` of the batches."""
        count = max(1, round(share * len(self.batches)))
        key = (tuple(sizes[name] for name in self.curves), count)
        if key not in self.known:
            everyone = [module for modules in self.readers.values() for module in modules]
            with frozen(self.model), restored(self.model, everyone):
                for name in self.curves:
                    self._stitch_(name, sizes[name])
                now = (self.output.read(self.model, batch) for batch in self.batches[:count])
                self.known[key] = change(now, self.before[:count], self.output.distance)
        return self.known[key]

    def _stitch_(self, name: str, size: int) -> None:
        """Give the readers of an axis, in place, the weights they have at a size."""
        if size == self.layout.axis(name).units:
            return
        parameters = self._parameters(name)
        stored = self.stitches.pop((name, size), None)
        if stored is None:
            silence_(self.model, self.layout, name, self.curves[name].kept(size), self.fit)
            stored = [parameter.detach().clone() for parameter in parameters]
            room = HELD - sum(one.nbytes for one in stored)
            while self.stitches and sum(one.nbytes for many in self.stitches.values() for one in many) > room:
                del self.stitches[next(iter(self.stitches))]
        else:
            with torch.no_grad():
                for parameter, value in zip(parameters, stored, strict=True):
                    parameter.copy_(value)
        self.stitches[name, size] = stored

    def _parameters(self, name: str) -> list[nn.Parameter]:
        """Weights and biases of the readers of an axis."""
        return [
            parameter for module in self.readers[name] for parameter in self.model.get_submodule(module).parameters()
        ]
