"""Layers that compute as they will when rounded, and are trained so: the straight-through estimator.

The value of a product is that of rounded factors, its gradient as if they had not been, but for activations beyond
their range, which get none (Jacob et al., "Quantization and Training of Neural Networks", 2018, section 3). The grid of
weights moves with the weights. The ranges of activations are those that calibration text shows before, and stay: they
are numbers that the artifact will have, and training fits the weights to them. Layers with one matrix have one range.

A layer becomes the subclass of its kind that rounds: its weight keeps its name, so masks and checkpoints find it, and
0 lies on every grid, so zeros stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.codes import through
from compress.contract import GRID
from compress.data.calibration import BATCH, calibration
from compress.errors import TrainingError
from compress.state import State
from passes.quantization.grid import Grid
from passes.quantization.qat import Qat
from passes.watch import blocks_of, read_rows

TOP = 255  # the greatest code of an activation; the least is 0


class Range(nn.Module):
    """Rounds what it is given to 256 values from `low` to `high`, of which one is 0."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def see(self, values: Tensor) -> None:
        """Widen the range to hold the values."""
        if values.numel():
            self.low, self.high = torch.minimum(self.low, values.min()), torch.maximum(self.high, values.max())

    @property
    def scale_and_zero(self) -> Tensor:
        """The step and the code of 0, (2,) in float32, as ONNX has them."""
        wide = self.high - self.low
        scale = torch.where(wide > 0, wide / TOP, 1.0)
        return torch.stack([scale, (-self.low / scale).round()])

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values, of the shape given."""
        scale, zero = self.scale_and_zero
        codes = (x.float() / scale).round() + zero
        near = (codes.clamp(0, TOP) - zero) * scale
        return through(near.to(x.dtype), x.clamp((0 - zero) * scale, (TOP - zero) * scale))


class Rounded(nn.Module):
    """Multiplies what `read` leaves of an input by its matrix on the grid."""

    weight: Any
    bias: Any
    read: nn.Module
    bits: int
    group: int | None

    def matrix(self) -> Tensor:
        """The weight as it is trained, (out, in)."""
        return self.weight

    def grid(self) -> Grid:
        """That of the weight as it is."""
        matrix = self.matrix().detach()
        return Grid.fit(matrix, self.bits, self.group or matrix.shape[1], symmetric=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        matrix = self.matrix()
        near = self.grid().nearest(matrix.detach()).to(matrix.dtype)
        return F.linear(self.read(x), through(near, matrix), self.bias)


class RoundedLinear(Rounded, nn.Linear):
    """A `Linear` on a grid."""


class RoundedConv1D(Rounded, Conv1D):
    """A `Conv1D` on a grid; its own weight is (in, out)."""

    def matrix(self) -> Tensor:
        """The weight as it is trained, (out, in)."""
        return self.weight.T


KINDS: dict[type[nn.Module], type[Rounded]] = {nn.Linear: RoundedLinear, Conv1D: RoundedConv1D}


@contextmanager
def on_grid(state: State, options: Qat) -> Iterator[dict[str, str]]:
    """Inside, the linear layers of all blocks compute rounded; afterwards they are what they were, on a grid.

    The grid is a fact then, with the scale and the zero of each layer's input where activations are rounded. Yields
    which layers go without, and why. Raises TrainingError where all do.
    """
    layers, skipped = _layers(state.model, blocks_of(state.layout))
    if not layers:
        raise TrainingError(f"qat: none of {len(skipped)} layers of blocks can lie on a grid; expected some Linear")
    reads: dict[int, Any] = {}
    for layer in layers.values():
        reads.setdefault(id(layer.weight), Range() if options.activations else nn.Identity())
        reads[id(layer.weight)].to(layer.weight.device)
    read = {name: reads[id(layer.weight)] for name, layer in layers.items()}
    if options.activations:
        batches = calibration(state.data, options.samples, BATCH)
        read_rows(state.model, read, batches, lambda name, rows: read[name].see(rows))
    for name, layer in layers.items():
        layer.read, layer.bits, layer.group = read[name], options.weights, options.group
        layer.__class__ = KINDS[type(layer)]
    try:
        yield skipped
    finally:
        state.give(GRID, _settled(layers, options.weights))


def _layers(model: PreTrainedModel, blocks: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The linear layers of blocks by name, and those that can't be rounded with the reason."""
    found: dict[str, Any] = {}
    skipped = {}
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if type(module) in KINDS:
                found[name] = module
            elif isinstance(module, tuple(KINDS)):
                skipped[name] = f"it is a {type(module).__name__}"
    return found, skipped


@torch.no_grad()
def _settled(layers: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """Leave the layers as they were, with their weights on the grid, which is given; shared ones are in it once."""
    told: dict[str, Any] = {"bits": bits, "layers": [], "groups": {}}
    seen = set()
    for name, layer in layers.items():
        if id(layer.weight) not in seen:
            grid = layer.grid()
            near = grid.nearest(layer.matrix()).to(layer.weight.dtype)
            layer.weight.data = (near.T if isinstance(layer, Conv1D) else near).contiguous()
            told |= {f"{name}.scale": grid.scale.cpu(), f"{name}.zero": grid.zero.to(torch.uint8).cpu()}
            told["layers"].append(name)
            told["groups"][name] = grid.group
            if isinstance(layer.read, Range):
                told[f"{name}.input"] = layer.read.scale_and_zero.cpu()
            seen.add(id(layer.weight))
        layer.__class__ = next(plain for plain, kind in KINDS.items() if kind is type(layer))
        del layer.read, layer.bits, layer.group
    return told
