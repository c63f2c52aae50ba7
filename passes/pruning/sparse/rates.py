"""Rates: the share of zeros that each matrix gets, so that the relative errors of their outputs have the least sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from compress.allocate import solve
from compress.progress import track
from compress.state import State
from compress.statistics import moments
from passes.blocks import entered, matrices_of
from passes.pruning.sparse.oneshot import output_error, wanda
from passes.pruning.sparse.pattern import Pattern
from passes.pruning.sparse.sparsity import stored, unfit

LEVELS = tuple(number / 20 for number in range(20))  # shares of zeros that a matrix may get


def allocated(state: State, batches: Sequence[Mapping[str, Tensor]], pattern: Pattern) -> dict[str, float]:
    """The share of zeros of each matrix by name; over all they are at least as many as the pattern says."""
    curves: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    seen: dict[int, str] = {}
    blocks = sum(stack.length for stack in state.layout.stacks.values())
    for block in track(entered(state.model, state.layout, batches), "errors of all matrices", blocks):
        layers, _ = matrices_of(state.model, block.name, seen)
        weights = {name: stored(layer, layer.weight.detach()) for name, layer in layers.items()}
        weights = {name: one for name, one in weights.items() if not unfit(name, one.shape[1], pattern)}
        facts = moments(state.model, list(weights), block.calls, call=block.run) if weights else {}
        for name, weight in weights.items():
            curves[name], sizes[name] = curve(weight, facts.pop(f"{name}.gram"), pattern), weight.numel()
            seen[id(layers[name].weight)] = name
    held = [np.array([(1 - level) * size for level in LEVELS]) for size in sizes.values()]
    budget = (1 - pattern.sparsity) * sum(sizes.values())
    return {name: LEVELS[at] for name, at in zip(curves, solve(list(curves.values()), held, budget), strict=True)}


def curve(weight: Tensor, gram: Tensor, pattern: Pattern) -> np.ndarray:
    """The relative squared error of a matrix's outputs at each of the `LEVELS`, by Wanda's choice."""
    whole = max(output_error(weight, gram), 1e-30)
    sparse = [wanda(weight, gram, pattern.at(level))[0] for level in LEVELS]
    return np.array([output_error(one - weight, gram) / whole for one in sparse])
