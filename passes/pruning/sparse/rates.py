"""Rates: the share of zeros that each matrix gets, so that the loss rises least by all of them together.

What zeros in a matrix cost the loss is taken as ``sum_i G_i (D H D^T)_ii`` for a change ``D``: the squared error of
each output, under the Gram matrix ``H`` of the inputs, times the mean square ``G`` of the loss's gradient by it. This
is the curvature of K-FAC (Martens & Grosse, arXiv:1503.05671) with the outputs' part reduced to its diagonal.
Errors of the outputs alone, relative to the outputs, did worse than one rate for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from compress.allocate import solve
from compress.progress import track
from compress.state import State
from compress.statistics import moments
from passes.blocks import entered
from passes.gram import output_error
from passes.pruning.sparse.gradients import by_outputs
from passes.pruning.sparse.oneshot import wanda
from passes.pruning.sparse.pattern import Pattern
from passes.pruning.sparse.sparsity import matrices, stored

LEVELS = tuple(number / 20 for number in range(20))  # shares of zeros that a matrix may get


def allocated(state: State, batches: Sequence[Mapping[str, Tensor]], pattern: Pattern) -> dict[str, float]:
    """The share of zeros of each matrix by name; over all, before rounding, at least as many as the pattern says.

    Raises TrainingError where the model has no loss of its own on the data.
    """
    layers, _ = matrices(state, pattern)
    worths = by_outputs(state, layers, batches)
    curves: dict[str, np.ndarray] = {}
    blocks = sum(stack.length for stack in state.layout.stacks.values())
    for block in track(entered(state.model, state.layout, batches), "errors of all matrices", blocks):
        names = [name for name in layers if name.startswith(f"{block.name}.")]
        facts = moments(state.model, names, block.calls, call=block.run) if names else {}
        for name in names:
            weight = stored(layers[name], layers[name].weight.detach())
            curves[name] = curve(weight, facts.pop(f"{name}.gram"), worths[name], pattern)
    held = [np.array([(1 - level) * layers[name].weight.numel() for level in LEVELS]) for name in curves]
    budget = (1 - pattern.sparsity) * sum(layers[name].weight.numel() for name in curves)
    return {name: LEVELS[at] for name, at in zip(curves, solve(list(curves.values()), held, budget), strict=True)}


def curve(weight: Tensor, gram: Tensor, worth: Tensor, pattern: Pattern) -> np.ndarray:
    """What the loss rises by at each of the `LEVELS` of a matrix (out, in), by Wanda's choice; up to one factor.

    `worth` (out,) is the square of the loss's gradient by each output.
    """
    scale = worth.sqrt()[:, None]
    sparse = [wanda(weight, gram, pattern.at(level))[0] for level in LEVELS]
    return np.array([output_error((one - weight) * scale, gram) for one in sparse])
