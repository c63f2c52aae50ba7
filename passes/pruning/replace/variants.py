"""What may stand where an attention or a feed-forward layer stands, and how it is put there without any training.

A sub-block is an axis of the layout. Its variants keep fewer of its units (key-value heads with their query heads, or
columns), or put one Linear in its place, or nothing. The units kept are those that contribute most: how long, on
average, the vector is that a unit adds to the output. For a column i that is ``E|x_i| * ||W_down[:, i]||``, the channel
contribution of Puzzle (arXiv:2411.19146, section 3.2), and for a head ``E||W_o[:, head] x_head||``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.latency import step_of
from compress.layout import Axis
from compress.linear import linearise
from compress.progress import track
from compress.state import State
from compress.statistics import frozen, real_rows, run_body
from passes.pruning.widths.database import matrix, projection

Offer = float | Literal["linear", "none"]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """What may stand for one sub-block: units of its axis that stay, or a Linear.

    `weights` are those that were fitted or trained, by the name of the parameter in the whole model.
    """

    name: str
    keep: tuple[int, ...]
    linear: bool = False
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def contributions(weight: Tensor, inputs: Tensor, width: int) -> Tensor:
    """Summed over tokens, the norm of what each unit adds to ``W x``: (units,).

    `weight` is (out, units * width), `inputs` are (tokens, units * width). The norm needs only the (width, width) Gram
    matrix of the unit's columns.
    """
    columns = weight.unflatten(1, (-1, width))
    grams = torch.einsum("ouw,ouv->uwv", columns, columns)
    read = inputs.unflatten(1, (-1, width))
    return torch.einsum("tuw,uwv,tuv->tu", read, grams, read).clamp(min=0).sqrt().sum(0)


def importance(state: State, axes: Sequence[Axis], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """For each axis the contribution of its units (units,), summed over all its readers and real tokens."""
    totals = {axis.name: torch.zeros(axis.units, dtype=torch.float64) for axis in axes}
    mask: Tensor | None = None

    def reading(axis: Axis, width: int) -> Any:
        def hook(module: nn.Linear, inputs: Any) -> None:
            added = contributions(matrix(module).float(), real_rows(inputs[0], mask), width)
            totals[axis.name] += added.double().cpu()

        return hook

    with ExitStack() as hooks, frozen(state.model):
        for axis in axes:
            for site in axis.readers:
                handle = projection(state.model, site).register_forward_pre_hook(reading(axis, site.width))
                hooks.callback(handle.remove)
        for batch in track(batches, "contributions", len(batches)):
            mask = batch.get("attention_mask")
            run_body(state.model, batch)
    return totals


def offered(axis: Axis, offers: Sequence[Offer], importance: Tensor) -> tuple[list[Variant], list[str]]:
    """The variants of an axis, from the least to the whole, and the offers that it can't take.

    Shares of columns are rounded to the steps of matrix kernels, shares of heads to whole ones, and to one at least.
    """
    order = importance.argsort(descending=True).tolist()
    step = step_of(axis.units) if axis.kind == "columns" else 1
    least = max(1, axis.least)
    sizes = {max(least, round(one * axis.units / step) * step) for one in offers if isinstance(one, float)}
    kept = [Variant(f"{size} of {axis.units}", tuple(sorted(order[:size]))) for size in sorted(sizes - {axis.units})]
    words = [word for word in ("none", "linear") if word in offers]
    gone = [] if axis.least else [Variant(word, (), linear=word == "linear") for word in words]
    return [*gone, *kept, Variant("whole", tuple(range(axis.units)))], words if axis.least else []


def twin(state: State, block: str) -> State:
    """A state to try variants in one block on: its model is a copy that shares all tensors, and other blocks whole.

    Without a block, as for an axis that all share, only tensors are shared. Cutting makes new parameters and changes
    none in place, so the model of `state` stays as it is.
    """
    model = state.model
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    for name, module in model.named_modules() if block else ():
        if name and not f"{block}.".startswith(f"{name}.") and not name.startswith(f"{block}."):
            shared.append(module)
    copied = copy.deepcopy(model, {id(one): one for one in shared})
    return replace(state, model=copied, kept=dict(state.kept), figures={})


def place_(state: State, axis: str, variant: Variant) -> None:
    """Let a variant stand for the whole sub-block, in the state's own model."""
    if variant.linear:
        state.layout = linearise(state.model, state.layout, axis)
    state.cut(axis, variant.keep)
    put_(state.model, variant.weights)


def put_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give parameters new values without changing the old tensors, which a twin shares."""
    for name, value in weights.items():
        owner, _, leaf = name.rpartition(".")
        learns = model.get_parameter(name).requires_grad
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value.clone(), requires_grad=learns))
