"""Block-wise local distillation: a variant of a sub-block learns, on the parent's activations, to give what that gave.

The parent runs once over the calibration batches while hooks keep how one block was called and what the readers of its
axes gave. A child block with one variant in it, called the same way, then differs by that variant alone, so that each
is fitted without the others and no gradient crosses a block (Puzzle, arXiv:2411.19146, section 3).

The Linear is the least-squares fit from its inputs to the parent's outputs, for attention and feed-forward layers
alike: no linear map has a smaller local loss on the calibration text, those that Puzzle starts from among them (the
product of value and output, or of up and down projections), and where a token attends to nothing but itself the fit
*is* the product of value and output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import LayoutError
from compress.layout import Axis
from compress.progress import track
from compress.state import State
from compress.statistics import frozen, real_rows
from passes.pruning.replace.variants import Batch, Offer, Variant, importance, offered, place_, put_, twin
from passes.watch import answer

DAMPING = 0.01  # of the mean of the diagonal, so that inputs hardly seen get no large weights
TINY = 1e-12


@dataclass
class Example:
    """One call of a block in the parent: its arguments, the mask of the batch, and what each reader gave."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)


def examples_of(model: PreTrainedModel, axes: Sequence[Axis], batches: Sequence[Batch]) -> list[Example]:
    """How the block of these axes was called for each batch, and what their readers gave."""
    example = Example()

    def called(module: Any, args: Any, kwargs: Any) -> None:
        example.args, example.kwargs = args, kwargs

    def giving(path: str) -> Any:
        return lambda module, inputs, output: example.outputs.update({path: output})

    found = []
    with ExitStack() as hooks, frozen(model):
        block = model.get_submodule(axes[0].block)
        hooks.callback(block.register_forward_pre_hook(called, with_kwargs=True).remove)
        for site in (site for axis in axes for site in axis.readers):
            handle = model.get_submodule(site.module).register_forward_hook(giving(site.module))
            hooks.callback(handle.remove)
        for batch in batches:
            example = Example(mask=batch.get("attention_mask"))
            answer(model, batch)
            found.append(example)
    return found


def through(model: PreTrainedModel, axis: Axis, example: Example) -> tuple[Tensor, Tensor, Tensor]:
    """For real tokens, what the reader of an axis reads and gives when its block is called as in the parent.

    Returns inputs (tokens, in), outputs (tokens, out) and the parent's outputs (tokens, out).
    """
    path, met = axis.readers[0].module, dict[str, Tensor]()

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        met.update(read=inputs[0], given=output)

    with model.get_submodule(path).register_forward_hook(keep):
        model.get_submodule(axis.block)(*example.args, **example.kwargs)
    read, given, goal = (real_rows(one, example.mask) for one in (met["read"], met["given"], example.outputs[path]))
    return read, given, goal


def normalised_error(mine: Tensor, goal: Tensor) -> Tensor:
    """``MSE(goal, mine) / MSE(goal, 0)``: 0 where they agree, 1 for zeros; any shape, the same for both."""
    return (mine - goal).square().mean() / goal.square().mean().clamp(min=TINY)


def fit_linear(inputs: Tensor, outputs: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of the linear map from inputs (tokens, in) nearest to outputs (tokens, out).

    Ridge regression about the means, so that the bias is not damped.
    """
    x, y = inputs.double(), outputs.double()
    means = x.mean(0), y.mean(0)
    x, y = x - means[0], y - means[1]
    gram = x.T @ x
    gram.diagonal().add_(damping * gram.diagonal().mean().clamp(min=TINY))
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight.to(inputs.dtype), (means[1] - weight @ means[0]).to(inputs.dtype)


@dataclass(frozen=True)
class Local:
    """Fits and trains the variants of one block, for `steps` steps of Adam at `learning_rate`."""

    state: State
    examples: Sequence[Example]
    steps: int
    learning_rate: float

    def fitted(self, axis: Axis, variant: Variant) -> tuple[Variant, float]:
        """The variant with its best weights, and their local loss over all examples; the whole one's is 0."""
        child = twin(self.state, axis.block)
        place_(child, axis.name, variant)
        with frozen(child.model):
            if variant.linear:
                variant = replace(variant, weights=self.linear(child.model, axis))
                put_(child.model, variant.weights)
            loss = self.loss(child.model, axis)
            if not self.steps or variant.name == "whole":
                return variant, loss
            trained = self.trained(child.model, axis)
            after = self.loss(child.model, axis)
        return (replace(variant, weights=trained), after) if after < loss else (variant, loss)

    def loss(self, model: PreTrainedModel, axis: Axis) -> float:
        """Mean local loss over all examples."""
        losses = [normalised_error(*through(model, axis, example)[1:]) for example in self.examples]
        return float(torch.stack(losses).mean())

    def linear(self, model: PreTrainedModel, axis: Axis) -> dict[str, Tensor]:
        """The least-squares weights of the Linear that stands for an axis."""
        rows = [through(model, axis, example) for example in self.examples]
        weight, bias = fit_linear(torch.cat([read for read, _, _ in rows]), torch.cat([goal for _, _, goal in rows]))
        path = axis.readers[0].module
        return {f"{path}.weight": weight, f"{path}.bias": bias}

    def trained(self, model: PreTrainedModel, axis: Axis) -> Mapping[str, Tensor]:
        """Train, in place, what is left of the sub-block's weights; those are copies and not the parent's."""
        modules = tuple(f"{site.module}." for site in axis.sites)
        names = [name for name, _ in model.named_parameters() if name.startswith(modules)]
        put_(model, {name: model.get_parameter(name).detach() for name in names})
        parameters = [model.get_parameter(name).requires_grad_(True) for name in names]
        if not parameters:
            return {}
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        with torch.enable_grad():
            for step in range(self.steps):
                loss = normalised_error(*through(model, axis, self.examples[step % len(self.examples)])[1:])
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        return {name: model.get_parameter(name).detach() for name in names}


@dataclass(frozen=True)
class Library:
    """The variants of each axis from the least to the whole, their local losses where measured, and what was left out.

    A choice names a variant of each axis by its number.
    """

    variants: Mapping[str, Sequence[Variant]]
    losses: Mapping[str, Sequence[float]]
    skipped: Mapping[str, str]

    def built(self, state: State, choice: Mapping[str, int]) -> State:
        """A branch of the state with the chosen variants in it."""
        branch = state.branch()
        for axis, index in choice.items():
            place_(branch, axis, self.variants[axis][index])
        return branch

    def names(self, choice: Mapping[str, int]) -> dict[str, str]:
        """A choice in words."""
        return {axis: self.variants[axis][index].name for axis, index in choice.items()}

    def told(self, numbers: Mapping[str, Iterable[float]]) -> dict[str, dict[str, float]]:
        """Numbers of the variants under their names."""
        return {
            axis: {variant.name: float(one) for variant, one in zip(self.variants[axis], row, strict=True)}
            for axis, row in numbers.items()
        }


def library(
    state: State, offers: Mapping[str, Sequence[Offer]], batches: Sequence[Batch], steps: int, learning_rate: float
) -> Library:
    """Make the variants that `offers` names by kind of axis; raises LayoutError where no axis can shrink.

    An axis that all blocks share has variants, but nothing is trained for it: no single block holds it.
    """
    axes = [axis for axis in state.layout.axes.values() if axis.units > axis.least]
    if not axes:
        raise LayoutError("nothing is left in this model that a smaller variant could stand for")
    weights = importance(state, axes, batches)
    variants, losses, skipped = dict[str, Sequence[Variant]](), dict[str, list[float]](), dict[str, str]()
    for block in track(blocks := list(dict.fromkeys(axis.block for axis in axes)), "variants", len(blocks)):
        group = [axis for axis in axes if axis.block == block]
        local = Local(state, examples_of(state.model, group, batches), steps, learning_rate) if block else None
        for axis in group:
            offer, left_out = offered(axis, offers[axis.kind], weights[axis.name])
            if left_out:
                skipped[axis.name] = f"no {' or '.join(left_out)}: other blocks or the cache need a unit of it"
            if local is not None:
                fitted = [local.fitted(axis, variant) for variant in offer]
                offer, losses[axis.name] = [variant for variant, _ in fitted], [loss for _, loss in fitted]
            variants[axis.name] = offer
    return Library(variants, losses, skipped)
