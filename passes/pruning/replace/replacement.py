"""What a variant does to the whole model, and what the model would pay for it: the numbers that Puzzle's program sums.

One variant is put into the otherwise unmodified parent, and the child's answer is compared with the parent's: by
KL(parent || child) of the logits, or, in an encoder without a head, by the relative squared error of its last hidden
states. The parent's own variant scores 0 (Puzzle, arXiv:2411.19146, section 4: replace-one-block scores).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import LayoutError
from compress.latency import Table
from compress.layout import Axis
from compress.progress import track
from compress.state import State
from compress.statistics import frozen
from passes.distillation.losses import logit_kl
from passes.pruning.amounts import counted
from passes.pruning.replace.variants import Batch, Variant, place_, twin
from passes.pruning.widths.database import matrix, projection
from passes.pruning.widths.sensitivity import relative_change
from passes.watch import answer, blocks_of, recalled, remembered

Variants = Mapping[str, Sequence[Variant]]  # the variants of each axis, the whole one last


def replacement_scores(state: State, variants: Variants, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """For each axis the score of its variants (variants,), meaned over the texts of all batches.

    Blocks before the one that differs give what they gave in the parent.
    """
    blocks = blocks_of(state.layout)
    scores = {axis: np.zeros(len(row)) for axis, row in variants.items()}
    texts = [len(next(iter(batch.values()))) for batch in batches]
    with frozen(state.model):
        for batch, count in zip(track(batches, "replace one block", len(batches)), texts, strict=True):
            with remembered(state.model, blocks) as outputs:
                parent = answer(state.model, batch)
            for axis, row in variants.items():
                block = state.layout.axis(axis).block
                earlier = {name: outputs[name] for name in blocks[: blocks.index(block) if block else 0]}
                for index, variant in enumerate(row[:-1]):  # the last is the parent's own
                    child = with_one(state, axis, variant)
                    with recalled(child, earlier):
                        scores[axis][index] += distance(parent, answer(child, batch), batch) * count / sum(texts)
    return scores


def with_one(state: State, axis: str, variant: Variant) -> PreTrainedModel:
    """The parent with one variant in it."""
    child = twin(state, state.layout.axis(axis).block)
    place_(child, axis, variant)
    return child.model


def distance(parent: Any, child: Any, batch: Batch) -> float:
    """How far a child's outputs are from the parent's for one batch, by all logits they have or by hidden states."""
    mask: Tensor | None = batch.get("attention_mask")
    logits = [name for name in parent if name.endswith("logits")]
    if not logits:
        return float(relative_change(parent[0], child[0], mask).mean())
    total = 0.0
    for name in logits:
        theirs, mine = parent[name], child[name]
        rows = mask.to(theirs.device).bool() if mask is not None and mask.shape == theirs.shape[:-1] else None
        total += float(logit_kl(mine, theirs, rows))
    return total


def parameters(state: State, variants: Variants) -> dict[str, np.ndarray]:
    """For each axis the share of the parameters but embeddings and head that its variants (variants,) leave."""
    counts = {
        axis: np.array([float(counted(with_one(state, axis, one))) for one in row]) for axis, row in variants.items()
    }
    return shares(counts, counted(state.model))


def cache(state: State, variants: Variants) -> dict[str, np.ndarray]:
    """For each axis the share of the key-value cache, at the target's shape, that its variants (variants,) leave."""
    tokens = cached_tokens(state)
    taken = {}
    for name, row in variants.items():
        axis = state.layout.axis(name)
        unit = min(site.width for site in axis.sites) * tokens.get(name, 0)  # the width of a key, not of its queries
        taken[name] = np.array([float(len(variant.keep) * unit) for variant in row])
    axes = [state.layout.axis(name) for name in tokens]
    whole = sum(axis.units * min(site.width for site in axis.sites) * tokens[axis.name] for axis in axes)
    return shares(taken, whole)


def cached_tokens(state: State) -> dict[str, int]:
    """How many tokens the cache holds of each axis of heads, at the target's sequence; a sliding window bounds them.

    Raises LayoutError where the model keeps no cache, or all heads in one axis.
    """
    window = getattr(state.model.config.get_text_config(), "sliding_window", None) or state.target.sequence
    within = min(window, state.target.sequence)
    tokens = {
        name: within if kind.startswith("sliding") else state.target.sequence
        for stack in state.layout.stacks.values()
        for index, kind in enumerate(stack.caches)
        if (name := f"{stack.module}.{index}.heads") in state.layout.axes
    }
    if not tokens:
        raise LayoutError(
            f"memory: a model of type '{state.model.config.model_type}' keeps no key-value cache by block"
        )
    return tokens


def shares(amounts: Mapping[str, np.ndarray], whole: float) -> dict[str, np.ndarray]:
    """What each variant leaves of `whole`, so that the shares of any choice sum up to what is left with all of them.

    `amounts` are (variants,) for each axis, the whole variant's last; only differences to that count.
    """
    return {axis: 1 / len(amounts) + (row - row[-1]) / whole for axis, row in amounts.items()}


def milliseconds(table: Table, state: State, variants: Variants) -> dict[str, np.ndarray]:
    """For each axis the time of its variants (variants,).

    The Linear is not measured. It is given the time of as many columns of a feed-forward layer, that of its own block
    where that is left, as hold as many weights as it has; beyond the layer's width, time grows in proportion.
    """
    feeds = [axis for axis in state.layout.axes.values() if axis.kind == "columns" and axis.units]

    def linear(axis: Axis) -> float:
        if not feeds:
            return table.milliseconds(axis.name, axis.units)
        feed = max(feeds, key=lambda one: one.block == axis.block)
        columns = len(matrix(projection(state.model, axis.readers[0]))) / len(feed.sites)
        inside = min(columns, feed.units)
        return table.milliseconds(feed.name, round(inside)) * columns / inside

    def time(axis: Axis, variant: Variant) -> float:
        return linear(axis) if variant.linear else table.milliseconds(axis.name, len(variant.keep))

    return {
        name: np.array([time(state.layout.axis(name), variant) for variant in row]) for name, row in variants.items()
    }
