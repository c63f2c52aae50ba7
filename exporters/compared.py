"""What an artifact computes beside what the model computes, on random inputs of several shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.errors import ExportError
from exporters.base import outputs_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from compress.runtimes import Session
    from compress.state import State

SHAPES = ((1, 5), (3, 13), (4, 32))  # batch and sequence of the checks; none is the shape of an export


def worst_error(kind: str, state: State, session: Session, tolerance: float) -> float:
    """The largest difference of any output; raises ExportError where an output is missing or differs too much.

    `tolerance` is relative to the largest magnitude of the output, or to 1. Any finite difference is taken where it is
    infinite.
    """
    worst = 0.0
    for inputs in _checks(state, session):
        met, shape = session(inputs), tuple(next(iter(inputs.values())).shape)
        for name, expected in outputs_of(state.model, inputs).items():
            if name not in met:
                raise ExportError(f"{kind}: output '{name}' is missing; found {', '.join(met)}")
            error, allowed = error_of(expected, met[name], inputs.get("attention_mask"), tolerance)
            worst = max(worst, error)
            if not error <= allowed or error == float("inf"):
                raise ExportError(
                    f"{kind}: output '{name}' differs by {error:.3g} on inputs of shape {shape}; "
                    f"expected at most {allowed:.3g}"
                )
    return worst


def _checks(state: State, session: Session) -> Iterator[dict[str, Tensor]]:
    """Inputs of several shapes, the last row padded on its right; of the one shape where the graph takes no other."""
    from compress.runtimes import example_inputs

    for seed, (batch, sequence) in enumerate(((2, 16),) if session.fixed else SHAPES, start=1):
        inputs = example_inputs(state.model, state.tokenizer, batch, sequence, seed=seed)
        if "attention_mask" in inputs:
            inputs["attention_mask"][-1, -max(1, inputs["attention_mask"].shape[1] // 3) :] = 0
        yield inputs


def error_of(expected: Tensor, met: np.ndarray, mask: Tensor | None, tolerance: float) -> tuple[float, float]:
    """Largest difference, and what is allowed; places of padding, where attention may see nothing, are left out."""
    import torch

    found = torch.from_numpy(met)
    if found.shape != expected.shape:
        return float("inf"), tolerance
    if mask is not None and expected.ndim > 2 and expected.shape[:2] == mask.shape:
        expected, found = expected[mask.bool()], found[mask.bool()]
    difference = (expected - found).abs().max()
    return float(difference.nan_to_num(float("inf"))), tolerance * max(1.0, float(expected.abs().max()))
