"""An ONNX graph for ONNX Runtime, with open batch and sequence, checked against the model on shapes it never saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import ExportError
from exporters.base import Exporter, outputs_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from compress.runtimes.onnx import OnnxSession
    from compress.state import State

SHAPES = ((1, 5), (3, 13), (4, 32))  # batch and sequence of the checks; none is the shape of the export


class Onnx(Exporter):
    """model.onnx with its weights beside it, config and tokenizer.

    `tolerance` is the largest error taken, relative to the largest magnitude of the output it is found in (or to 1).
    """

    kind: ClassVar[str] = "onnx"
    folder: ClassVar[str] = "onnx"
    quantize: Literal["none"] = "none"
    tolerance: float = Field(default=1e-3, gt=0)

    def write(self, state: State, folder: Path, card: Mapping[str, Any]) -> float:
        """Export, open in ONNX Runtime, and compare outputs on random inputs of other shapes, padding among them."""
        from compress.runtimes import example_inputs
        from compress.runtimes.onnx import OnnxRuntime
        from compress.target import Target

        runtime = OnnxRuntime()
        runtime.require()
        runtime.build(state.model, example_inputs(state.model, state.tokenizer, 2, 16), folder)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(folder)
        session = runtime.open(folder, Target())
        worst = 0.0
        for inputs in _checks(state, session):
            met, shape = session(inputs), tuple(next(iter(inputs.values())).shape)
            for name, expected in outputs_of(state.model, inputs).items():
                if name not in met:
                    raise ExportError(f"onnx: output '{name}' is missing; found {', '.join(met)}")
                error, allowed = _error(expected, met[name], inputs.get("attention_mask"), self.tolerance)
                worst = max(worst, error)
                if not error <= allowed:
                    raise ExportError(
                        f"onnx: output '{name}' differs by {error:.3g} on inputs of shape {shape}; "
                        f"expected at most {allowed:.3g}"
                    )
        return worst


def _checks(state: State, session: OnnxSession) -> Iterator[dict[str, Tensor]]:
    """Inputs of several shapes, the last row padded on its right; of the one shape where the graph takes no other."""
    from compress.runtimes import example_inputs

    for seed, (batch, sequence) in enumerate(((2, 16),) if session.fixed else SHAPES, start=1):
        inputs = example_inputs(state.model, state.tokenizer, batch, sequence, seed=seed)
        if "attention_mask" in inputs:
            inputs["attention_mask"][-1, -max(1, inputs["attention_mask"].shape[1] // 3) :] = 0
        yield inputs


def _error(expected: Tensor, met: np.ndarray, mask: Tensor | None, tolerance: float) -> tuple[float, float]:
    """Largest difference, and what is allowed; places of padding, where attention may see nothing, are left out."""
    import torch

    found = torch.from_numpy(met)
    if found.shape != expected.shape:
        return float("inf"), tolerance
    if mask is not None and expected.ndim > 2 and expected.shape[:2] == mask.shape:
        expected, found = expected[mask.bool()], found[mask.bool()]
    difference = (expected - found).abs().max()
    return float(difference.nan_to_num(float("inf"))), tolerance * max(1.0, float(expected.abs().max()))
