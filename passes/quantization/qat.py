"""Options of training on a grid: `qat` of a training step, readable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.contract import Options


class Qat(Options):
    """Quantization-aware training: every product of the blocks is computed as it will be with rounded weights.

    Weights in 8 bits by row with activations in 8 bits are what `onnx: {quantize: int8_static}` multiplies, by the very
    scales trained with; weights alone, in runs of `group` inputs, what `weight_only` does.
    """

    weights: Literal[8, 4, 3] = Field(default=8, description="bits of weights, on grids as far below 0 as above")
    activations: Literal[8] | None = Field(default=8, description="bits of what each product reads; null: floats")
    group: int | None = Field(default=None, ge=1, description="inputs that share a scale; null: a row has one")
    samples: int = Field(default=128, ge=1, description="calibration texts that show the ranges of activations")

    @model_validator(mode="after")
    def _product(self) -> Qat:
        if self.activations and self.group:
            raise ValueError("whole numbers are summed along a row, which has one scale then; expected no group")
        if self.activations and self.weights < 8:
            raise ValueError(f"met activations in 8 bits and weights in {self.weights}; expected activations: null")
        return self
