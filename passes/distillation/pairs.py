"""Which block of the teacher each of the student's is compared with: the one that it was, wherever that stands now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.layout import Layout
from compress.record import record_of
from compress.state import State
from compress.stream import width_of
from compress.uniform import HIDDEN
from passes.distillation.losses.base import Widths


def places(state: State, mine: int, theirs: int) -> list[int]:
    """For each of the student's blocks the place of the block it was among the teacher's states after blocks.

    The last states are compared with the last whichever blocks they come from: both stand after the final norm.
    """
    left = origins(state.model.config, mine)
    right = list(origins(state.dense.config, theirs))
    if not state.dense.kin or not set(left[:-1]) <= set(right):  # spread evenly
        return [-(-(place + 1) * theirs // mine) - 1 for place in range(mine)]
    return [right.index(origin) for origin in left[:-1]] + [theirs - 1]


def headed(state: State, teacher: Any, dense: Layout) -> list[tuple[int, int]]:
    """The numbers of the student's blocks of the last stack that have heads left, each with the one it was."""
    name, stack = list(state.layout.stacks.items())[-1]
    left = origins(state.model.config, stack.length)
    right = list(origins(teacher.config, dense.stacks[name].length))
    axes = {axis.block for axis in state.layout.axes.values() if axis.kind == "heads" and axis.units}
    numbers = [number for number in range(stack.length) if f"{stack.module}.{number}" in axes]
    return [(number, right.index(left[number])) for number in numbers]


def widths_of(state: State) -> Widths:
    """What learned parts have to fit."""
    mine, theirs = (width_of(config) for config in (state.model.config, state.dense.config))
    blocks = list(state.layout.stacks.values())[-1].length
    kept = state.kept.get(HIDDEN)
    known = kept and len(kept) == mine and max(kept) < theirs  # else they are counted as in a model before that
    return Widths(mine, theirs, blocks, kept if known else None)


def same_hidden_width(state: State) -> bool:
    """Whether the states of model and teacher can be compared channel by channel."""
    return width_of(state.model.config) == width_of(state.dense.config)


def origins(config: Any, blocks: int) -> Sequence[int]:
    """Which blocks of the original model are left; all where none was dropped."""
    return next(iter(record_of(config)["blocks"].values()), range(blocks))
