"""What of a model's depth can go, the model without it, and by which score it goes first.

A part is told by its name: that of a block, or that of the axis of a sub-block (attention or feed-forward layer),
which is removed by cutting the axis to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.evaluate.measures import token_columns
from compress.layout import Layout
from compress.progress import track
from compress.state import State
from compress.statistics import frozen
from passes.pruning.depth.scores import angular_distances, greedily, influence, nearest_range
from passes.pruning.widths.sensitivity import HIDDEN, restored
from passes.watch import (
    Call,
    answer,
    blocks_of,
    first_of,
    last_of,
    real_tokens,
    recalled,
    remembered,
    stepped_over,
    watched,
)

Batches = Sequence[dict[str, Tensor]]
Choice = tuple[list[str], list[float]]  # the parts to remove and their scores
Choose = Callable[[int], Choice]  # for a number of parts


def candidates(layout: Layout, parts: str, keep_first: int, keep_last: int) -> list[str]:
    """The blocks or sub-blocks that can go, the first and last blocks of each stack left out.

    Of an axis that blocks share, or that must keep a unit, no sub-block can go.
    """
    blocks = [
        f"{name}.{index}"
        for name, stack in layout.stacks.items()
        for index in range(max(keep_first, stack.anchored), stack.length - keep_last)
    ]
    if parts == "blocks":
        return blocks
    return [axis.name for axis in layout.axes.values() if axis.block in blocks and axis.units and not axis.least]


@contextmanager
def without(model: PreTrainedModel, layout: Layout, parts: Sequence[str]) -> Iterator[None]:
    """The model as it would be without some parts, inside."""
    axes = [layout.axes[part] for part in parts if part in layout.axes]
    readers = [site.module for axis in axes for site in axis.readers]
    with restored(model, readers), stepped_over(model, [part for part in parts if part not in layout.axes]):
        for axis in axes:
            layout.silence(model, axis.name, range(axis.units))
        yield


def removed(state: State, parts: Sequence[str]) -> State:
    """A branch of the state without some parts."""
    branch = state.branch()
    for part in parts:
        if part in state.layout.axes:
            branch.cut(part, [])
    for name, stack in state.layout.stacks.items():
        branch.drop(name, [index for index in range(stack.length) if f"{name}.{index}" not in parts])
    return branch


def by_influence(state: State, parts: Sequence[str], batches: Batches, first_token: bool) -> Choose:
    """The parts of least influence, one minus the cosine between a block's output and the output without the part.

    For a whole block this is ShortGPT's block influence. It is averaged over real tokens, of which the first of each
    row may be left out: in decoders its huge states hide what the others do.
    """
    model, layout = state.model, state.layout
    sums, batch = dict.fromkeys(parts, 0.0), dict[str, Tensor]()
    counts = dict.fromkeys(parts, 0)

    def see(call: Call) -> None:
        mask = real_tokens(layout, call.block, batch, call.after)
        mask = mask if first_token else mask & ~first_of(mask)
        for part in parts:
            if part == call.block:
                absent = call.before
            elif part in layout.axes and layout.axes[part].block == call.block:
                with without(model, layout, [part]):
                    absent = call.again()
            else:
                continue
            change = influence(absent, call.after)[mask]
            sums[part], counts[part] = sums[part] + float(change.sum()), counts[part] + len(change)

    with frozen(model), watched(model, blocks_of(layout), see):
        for batch in track(batches, "measure influence", len(batches)):
            answer(model, batch)
    scores = {part: total / max(counts[part], 1) for part, total in sums.items()}
    order = sorted(scores, key=scores.__getitem__)
    return lambda count: (order[:count], [scores[part] for part in order[:count]])


def by_angle(state: State, parts: Sequence[str], batches: Batches) -> Choose:
    """The range of blocks in one stack over which the state of the last real token turns least; its only score."""
    model, layout = state.model, state.layout
    places = {name: [list[Tensor]() for _ in range(stack.length + 1)] for name, stack in layout.stacks.items()}
    batch = dict[str, Tensor]()

    def see(call: Call) -> None:
        last = last_of(real_tokens(layout, call.block, batch, call.before))
        rows = torch.arange(len(last), device=last.device)
        name, _, index = call.block.rpartition(".")
        places[name][int(index)].append(call.before[rows, last].cpu())
        if int(index) == layout.stacks[name].length - 1:
            places[name][-1].append(call.after[rows, last].cpu())

    with frozen(model), watched(model, blocks_of(layout), see):
        for batch in track(batches, "measure angles", len(batches)):
            answer(model, batch)
    distances = {
        name: angular_distances(torch.stack([torch.cat(one) for one in seen])) for name, seen in places.items()
    }
    numbers = {name: [int(p.removeprefix(f"{name}.")) for p in parts if p.startswith(f"{name}.")] for name in places}

    def choose(count: int) -> Choice:
        found = [
            (*nearest_range(distances[name], count, within[0], within[-1] + 1), name)
            for name, within in numbers.items()
            if len(within) >= count
        ]
        distance, start, name = min(found)
        return [f"{name}.{index}" for index in range(start, start + count)], [distance]

    return choose


def by_loss(state: State, parts: Sequence[str], batches: Batches) -> Choose:
    """The parts that cost least when removed one by one, each time the cheapest; the scores are the losses thereafter.

    The loss is the negative log likelihood of a token where a language model has labels, and else the relative squared
    error of the last hidden states. Blocks before the one that is weighed give what they gave, and those that are gone
    already are not run.
    """
    model, layout, blocks = state.model, state.layout, blocks_of(state.layout)
    labelled = state.task.packs and all("labels" in batch for batch in batches)
    with frozen(model):
        dense = [None if labelled else HIDDEN.read(model, batch) for batch in batches]

    def loss(batch: dict[str, Tensor], whole: Tensor | None) -> tuple[float, int]:
        if whole is None:
            return likelihood(model, batch, shift=int(state.task.name == "text-generation"))
        change = HIDDEN.distance(HIDDEN.read(model, batch), whole)
        return float(change.sum()), change.numel()

    def losses(gone: Sequence[str], left: Sequence[str]) -> dict[str, float]:
        sums, counts = dict.fromkeys(left, 0.0), dict.fromkeys(left, 0)
        for batch, whole in zip(batches, dense, strict=True):
            with frozen(model), without(model, layout, gone), remembered(model, blocks) as outputs:
                loss(batch, whole)
            for part in track(left, f"weigh removal {len(gone) + 1}", len(left)):
                block = layout.axes[part].block if part in layout.axes else part
                idle = {*blocks[: blocks.index(block)], *gone} & outputs.keys()
                known = {name: outputs[name] for name in idle}
                with frozen(model), without(model, layout, [*gone, part]), recalled(model, known):
                    value, tokens = loss(batch, whole)
                sums[part], counts[part] = sums[part] + value, counts[part] + tokens
        return {part: sums[part] / max(counts[part], 1) for part in left}

    order, taken = greedily(parts, losses), list[tuple[str, float]]()

    def choose(count: int) -> Choice:
        taken.extend(islice(order, max(0, count - len(taken))))
        return [part for part, _ in taken[:count]], [value for _, value in taken[:count]]

    return choose


def likelihood(model: PreTrainedModel, batch: dict[str, Tensor], shift: int) -> tuple[float, int]:
    """Negative log likelihood, summed, and number of labelled tokens; with `shift` 1, of those that follow."""
    targets = batch["labels"].to(model.device)[:, shift:]
    sums = token_columns(answer(model, batch).logits[:, : targets.shape[1]], targets, None)
    return float(sums["loss"].sum()), int(sums["tokens"].sum())
