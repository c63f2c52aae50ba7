"""What pruning an axis does to the whole model: a loss curve put on the scale of the model's own output.

Errors of different layers can't be compared: one layer's noise is wiped out by the next norm, another's reaches the
end. So every axis alone is pruned to a few sizes and the change of the last hidden states is measured. Small
independent changes add up, which is what an allocation needs of the numbers it sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from compress.evaluate.run import likeness
from compress.layout import Layout
from compress.progress import track
from compress.statistics import frozen, real_rows, run_body
from passes.pruning.widths.database import Curve, Fit, own_, silence_
from passes.watch import blocks_of, recalled, remembered

SHARES = (0.5, 0.25, 0.0)  # of an axis' units, measured; what lies between is interpolated
TINY = 1e-12
HELD = 2**26  # bytes of one batch's predictions that are kept to compare with


@dataclass(frozen=True)
class Output:
    """What of a model's output is compared: `read` gives it of real tokens (tokens, any), `distance` is (tokens,)."""

    read: Callable[[PreTrainedModel, Mapping[str, Tensor]], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]


def hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states (tokens, hidden)."""
    return real_rows(run_body(model, batch), batch.get("attention_mask"))


def relative_error(now: Tensor, before: Tensor) -> Tensor:
    """Squared change of each token's states relative to their own square."""
    return (now - before).square().sum(-1) / before.square().sum(-1).clamp(min=TINY)


def predictions(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits (tokens, vocabulary) of evenly chosen tokens, as many as are worth holding."""
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    logits = model(**{name: batch[name].to(model.device) for name in names}).logits
    rows = real_rows(logits, batch.get("attention_mask"))
    most = max(1, HELD // (4 * rows.shape[-1]))
    return rows[:: -(-len(rows) // most)].clone()


def divergence(now: Tensor, before: Tensor) -> Tensor:
    """KL(before, now) of each token's predictions, in nats."""
    return likeness(now, before).divergence


HIDDEN = Output(hidden_states, relative_error)
PREDICTIONS = Output(predictions, divergence)


def measured_losses(
    model: PreTrainedModel,
    layout: Layout,
    curves: Mapping[str, Curve],
    fit: Fit | None,
    batches: Sequence[dict[str, Tensor]],
) -> dict[str, np.ndarray]:
    """For each curve the relative squared error (units + 1,) of the model's last hidden states as its units go.

    The error is averaged over tokens. It is measured at the sizes of `SHARES` and in between follows the curve, on
    logarithmic scales; below the smallest measured one it is proportional to the curve. Blocks before the one that is
    pruned give what they gave, which is remembered.
    """
    blocks = blocks_of(layout)
    with frozen(model):
        before, given = [], []
        for batch in batches:
            with remembered(model, blocks) as outputs:
                before.append(HIDDEN.read(model, batch))
            given.append(outputs)

        def resumed(batch: int, earlier: Sequence[str]) -> Tensor:
            with recalled(model, {block: given[batch][block] for block in earlier}):
                return HIDDEN.read(model, batches[batch])

        losses = {}
        for name, curve in track(curves.items(), "measure sensitivity", len(curves)):
            axis = layout.axis(name)
            earlier = blocks[: blocks.index(axis.block)] if axis.block in blocks else []
            sizes = sorted({max(axis.least, int(share * axis.units)) for share in SHARES}, reverse=True)
            errors = []
            for size in sizes:
                with restored(model, [site.module for site in axis.readers]):
                    silence_(model, layout, name, curve.kept(size), fit)
                    now = (resumed(batch, earlier) for batch in range(len(batches)))
                    errors.append(change(now, before, relative_error))
            losses[name] = follow(curve.relative, axis.units - np.array(sizes), np.array(errors))
    return losses


def follow(curve: np.ndarray, places: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """A curve (units + 1,) bent to pass through `errors` at `places` (indices, ascending), never falling."""
    known = np.log(np.maximum(curve[places], TINY))
    heights = np.log(np.maximum.accumulate(np.maximum(errors, TINY)))
    asked = np.log(np.maximum(curve, TINY))
    bent = np.interp(asked, known, heights) + np.minimum(asked - known[0], 0)
    return np.where(curve > 0, np.exp(bent), 0.0)


def change(now: Iterable[Tensor], before: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean distance over tokens between what a model gives for each batch and what it gave `before`."""
    changes = [distance(new, old) for new, old in zip(now, before, strict=True)]
    return float(sum(one.sum() for one in changes)) / max(sum(one.numel() for one in changes), 1)


def relative_change(before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
    """Squared change of states (batch, tokens, hidden) relative to their own square, (tokens,) for all but padding."""
    return relative_error(real_rows(after, mask), real_rows(before, mask))


@contextmanager
def restored(model: PreTrainedModel, modules: Sequence[str]) -> Iterator[None]:
    """Inside, `modules` have parameters of their own to be written into; on leaving they have the former ones again.

    Those lie in the model's file, as it is mapped, and stay there.
    """
    held = [
        (part, dict(part.named_parameters(recurse=False)))
        for name in modules
        for part in model.get_submodule(name).modules()
    ]
    for part, _ in held:
        own_(part)
    try:
        yield
    finally:
        for part, parameters in held:
            for name, parameter in parameters.items():
                setattr(part, name, parameter)
