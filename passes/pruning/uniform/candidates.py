"""Cuts a model to a uniform shape by importance, and recovers it a little so that shapes can be compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.data.calibration import calibration
from compress.errors import LayoutError, TrainingError
from compress.families import layout_of
from compress.layout import Axis, stored_dim
from compress.progress import track
from compress.state import State, dense_name
from compress.uniform import HIDDEN, drop, narrow, resized, spans
from passes.pruning.uniform.importance import add_back
from passes.pruning.uniform.observe import Importance, measure_importance, removal_losses
from passes.pruning.uniform.shapes import Shape, Space

if TYPE_CHECKING:
    from passes.pruning.uniform.minitron import Minitron


@dataclass(frozen=True)
class Cutter:
    """Cuts the model of a state to any shape of its space, the least important units first."""

    options: Minitron
    state: State
    space: Space
    importance: Importance

    @classmethod
    def of(cls, options: Minitron, state: State, space: Space) -> Cutter:
        """Read importance from the calibration split, once for all shapes."""
        model, layout = state.model, state.layout
        batches = list(calibration(state.data, options.samples))
        stacks = {name: stack.length for name, stack in layout.stacks.items()}
        found = measure_importance(
            model, list(layout.axes.values()), _norms(model, state), stacks, track(batches, "importance", len(batches)),
            options.batch_statistic, options.sequence_statistic,
        )  # fmt: skip
        if options.depth == "perplexity":
            if state.task.name != "text-generation":
                raise TrainingError(f"minitron: depth: perplexity needs text-generation, met {state.task.name}")
            found.blocks = {
                name: removal_losses(model, name, length, lambda: next_token_loss(model, batches))
                for name, length in stacks.items()
            }
        return cls(options, state, space, found)

    def fits(self, shape: Shape) -> bool:
        """Whether stock transformers takes a shape."""
        sizes = {axis.name: shape[axis.kind] for axis in self.state.layout.axes.values()}
        try:
            resized(self.state.model, self.state.layout, {**sizes, HIDDEN: shape[HIDDEN]})
        except LayoutError:
            return False
        return True

    def speedup(self, branch: State) -> float:
        """How many times faster than the dense model a state's model is on the target."""
        from compress.measure import speedup
        from passes.pruning.speedups import timed

        return speedup(*timed(self.state, lambda: branch)).value

    def cut(self, shape: Shape) -> State:
        """A state of its own whose model has the shape; the state it is cut from stays as it was."""
        state, layout, importance = self.state, self.state.layout, self.importance
        keep = {axis.name: top(importance.axes[axis.name], shape[axis.kind]) for axis in layout.axes.values()}
        if importance.stream is not None:
            keep[HIDDEN] = top(importance.stream, shape[HIDDEN])
        source = state.model
        if self.options.add_back:
            source = copy.deepcopy(source)
            for axis in layout.axes.values():
                if axis.kind == "heads":
                    add_back_(source, axis, importance.axes[axis.name], shape["heads"])
        kept = dict(state.kept)
        for name, units in keep.items():
            origin = dense_name(name, state.model)
            before = kept.get(origin)
            kept[origin] = [before[unit] for unit in units] if before else units
        model = narrow(source, layout, keep)
        if self.options.rescale:
            for name, squares in importance.squares.items():
                rescale_(model.get_submodule(name), squares, keep[HIDDEN])
        after = layout_of(model)
        if shape["blocks"] < self.space.whole["blocks"]:
            after = drop(model, after, *self._blocks(shape["blocks"]))
        return replace(state, model=model, layout=after, kept=kept, facts=dict(state.facts), figures={}, others=())

    def _blocks(self, count: int) -> tuple[str, list[int]]:
        """The stack and its blocks that stay, those that others lean on among them."""
        if len(self.state.layout.stacks) > 1:
            raise LayoutError(
                "minitron: blocks are dropped from models of one stack; this one has an encoder and a decoder"
            )
        ((name, stack),) = self.state.layout.stacks.items()
        scores = self.importance.blocks[name].clone()
        scores[: stack.anchored] = torch.inf
        return name, top(scores, max(count, stack.anchored))


def top(scores: Tensor, count: int) -> list[int]:
    """Indices, in ascending order, of the `count` highest scores; of equal ones the first."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def add_back_(model: PreTrainedModel, axis: Axis, scores: Tensor, kept: int) -> None:
    """Let the heads of an axis that stay take in those that go, in place, in the weights that make them."""
    if axis.entries[0][1] > 1:
        raise LayoutError(
            "minitron: add_back is for heads with keys and values of their own; this model groups queries"
        )
    order = scores.argsort(descending=True, stable=True).tolist()
    for site in axis.sites:
        module: Any = model.get_submodule(site.module)
        if site.dim == 1 or isinstance(module, nn.Embedding):
            continue
        rows = axis.positions(site, range(axis.units))
        for parameter, dim in ((module.weight, stored_dim(module, 0)), (getattr(module, "bias", None), 0)):
            if parameter is not None:
                with torch.no_grad():
                    heads = parameter.index_select(dim, rows.to(parameter.device)).movedim(dim, 0)
                    mended = add_back(heads.unflatten(0, (axis.units, site.width)), order, kept).flatten(0, 1)
                    parameter.index_copy_(dim, rows.to(parameter.device), mended.movedim(0, dim))


def rescale_(norm: nn.Module, squares: Tensor, keep: Sequence[int]) -> None:
    """Let an RMS norm give, in place, what it gave before its mean square was that of the channels `keep` alone.

    ``w <- w sqrt(sum(x_kept^2) / sum(x_all^2) * d / d')``, with mean squares (d,) of what it reads. A norm with a bias
    takes the mean off as well and is let be.
    """
    if hasattr(norm, "bias"):
        return
    weight: Any = norm.weight
    factor = float((squares[list(keep)].sum() / squares.sum() * len(squares) / len(keep)).sqrt())
    offset = above_weight(norm)
    with torch.no_grad():
        weight.add_(offset).mul_(factor).sub_(offset)


def above_weight(norm: nn.Module) -> int:
    """How far above its weight lies what a norm multiplies by: 1 in some families, as what it makes of ones tells."""
    weight: Any = norm.weight
    with torch.no_grad():
        return 0 if hasattr(norm, "bias") else round(float((norm(torch.ones_like(weight)) - weight).mean()))


def recover(options: Minitron, state: State, folder: Path) -> dict[str, Any]:
    """Train the model of a state a little towards the dense one, in place; its losses before and after."""
    from compress.recipe import TrainingOptions
    from passes.distillation.choice import Losses
    from passes.distillation.compare import Comparison

    recipe = TrainingOptions(
        steps=options.recovery_steps, batch_size=options.batch_size, learning_rate=options.learning_rate, dropout=False,
        seed=options.seed,
    )  # fmt: skip
    compare = Comparison(Losses.fitting(state.task, labelled=False, same_width=False), state)
    told = compare.train(recipe, folder, "minitron", options.validation_rows)
    return {name: told[name] for name in ("loss_before", "loss_after", "steps")}


def next_token_loss(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean loss of a language model on its next tokens, over all but padding."""
    total, count = 0.0, 0
    for batch in batches:
        ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        labels = ids.masked_fill(mask == 0, -100)
        real = int((labels[:, 1:] != -100).sum())
        total += real * float(model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss)
        count += real
    return total / max(count, 1)


def _norms(model: PreTrainedModel, state: State) -> list[str]:
    """The norms over the residual stream: vectors that follow its width and are no bias."""
    found = spans(model, state.layout)
    return [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.endswith(".weight") and any(span.name == HIDDEN for span in found[name])
    ]
