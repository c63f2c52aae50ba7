"""Second moments of what linear layers read, streamed over calibration batches in memory that doesn't grow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import DataError

Batches = Iterable[Mapping[str, Tensor]]


def moments(
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Batches,
    view: Callable[[Tensor], Tensor] | None = None,
    call: Callable[[Mapping[str, Tensor]], Any] | None = None,
) -> dict[str, Any]:
    """Mean and Gram matrix of the inputs ``x`` (in,) of each named linear module or norm, over all tokens but padding.

    A `view` of them, (tokens, in) -> (tokens, in), is looked at in place of the inputs themselves. `call` says how a
    batch goes through the model where not all of it need run.

    Returns, for each module, ``{module}.gram``: mean of ``x x^T`` (in, in), ``{module}.mean``: mean of ``x`` (in,),
    both float32 and divided by the number of tokens, and ``{module}.count``: that number. One float32 matrix a module
    is held, a running mean, as a sum would lose digits while it grows. Raises DataError where there is no token to
    read, or where the inputs of a module aren't finite.
    """
    means = {name: _Means() for name in modules}
    mask: Tensor | None = None

    def reading(mean: _Means) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            rows = real_rows(inputs[0].detach(), mask)
            mean.add_(rows if view is None else view(rows))

        return hook

    with ExitStack() as hooks, frozen(model):
        for name, mean in means.items():
            handle = model.get_submodule(name).register_forward_pre_hook(reading(mean))
            hooks.callback(handle.remove)
        for batch in batches:
            mask = batch.get("attention_mask")
            call(batch) if call else run_body(model, batch)
    facts: dict[str, Any] = {}
    for name, mean in means.items():
        facts |= mean.facts(name)
    return facts


def run_body(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states (batch, tokens, hidden) of a batch; the logits where body and head are one module."""
    body: nn.Module = model.base_model
    known = inspect.signature(body.forward).parameters
    device = next(body.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name in known and name != "labels"}
    return body(**inputs)[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the model's own mode again outside."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def real_rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs (tokens, in) of all tokens but padding; a mask of another length belongs to another stack."""
    rows = inputs.flatten(end_dim=-2).float()
    if mask is None or mask.dim() != 2 or mask.numel() != len(rows):
        return rows
    return rows[mask.flatten().to(rows.device).bool()]


class _Means:
    """Running means over the tokens one module has read."""

    def __init__(self) -> None:
        self.count = 0
        self.gram: Tensor
        self.mean: Tensor

    def add_(self, rows: Tensor) -> None:
        if not len(rows):
            return
        if not self.count:
            self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.mean = rows.new_zeros(rows.shape[1])
        self.count += len(rows)
        before, each = 1 - len(rows) / self.count, 1 / self.count
        self.gram.addmm_(rows.T, rows, beta=before, alpha=each)
        self.mean.mul_(before).add_(rows.sum(0), alpha=each)

    def facts(self, name: str) -> dict[str, Any]:
        if not self.count:
            raise DataError(f"no calibration token has reached '{name}'; expected at least one batch with text")
        if not (self.gram.isfinite().all() and self.mean.isfinite().all()):
            raise DataError(f"the inputs of '{name}' are not finite on the calibration text")
        return {f"{name}.gram": self.gram, f"{name}.mean": self.mean, f"{name}.count": self.count}
