"""Gradients of a model's own loss, batch by batch: by its matrices, and by what they give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import TrainingError
from compress.state import State
from passes.pruning.sparse.sparsity import stored

Batch = Mapping[str, Tensor]
LABELS = ("labels", "start_positions")


def by_weights(
    state: State, layers: Mapping[str, Any], gone: Mapping[str, Tensor], batches: Iterable[Batch]
) -> Iterator[dict[str, Tensor]]:
    """For each batch the gradients (out, in) of layers by name, 0 where weights are `gone`."""
    weights = [layer.weight for layer in layers.values()]
    with differentiable(state.model, weights):
        for batch in batches:
            found = torch.autograd.grad(loss_of(state, batch), weights, materialize_grads=True)
            named = zip(layers.items(), found, strict=True)
            yield {name: stored(layer, one).masked_fill(gone[name], 0.0) for (name, layer), one in named}


def by_outputs(state: State, layers: Mapping[str, Any], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """For layers by name the squares of the gradients by each output, (out,), summed over all tokens."""
    sums: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}

    def holding(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            held[name] = output

        return hook

    with ExitStack() as hooks, differentiable(state.model, [layer.weight for layer in layers.values()]):
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(holding(name)).remove)
        for batch in batches:
            loss = loss_of(state, batch)
            found = torch.autograd.grad(loss, list(held.values()), materialize_grads=True)
            for name, one in zip(held, found, strict=True):
                squares = one.flatten(0, -2).double().square().sum(0)
                sums[name] = sums[name] + squares if name in sums else squares
            held.clear()
    return sums


def loss_of(state: State, batch: Batch) -> Tensor:
    """The model's own loss on a batch; raises TrainingError where it has none."""
    given = {name: tensor.to(state.model.device) for name, tensor in batch.items()}
    if not given.keys() & set(LABELS):
        raise TrainingError(
            f"zeros by gradients: {state.task.name} on this data has no loss of its own; expected a task with a head "
            "and labels, or sparsify with uniform rates"
        )
    loss: Tensor = state.model(**given).loss
    return loss


@contextmanager
def differentiable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the model is in evaluation mode and gradients are those of the weights alone."""
    training, trained = model.training, [one for one in model.parameters() if one.requires_grad]
    model.eval().requires_grad_(False)
    for one in weights:
        one.requires_grad_(True)
    try:
        yield
    finally:
        model.train(training).requires_grad_(False)
        for one in trained:
            one.requires_grad_(True)
