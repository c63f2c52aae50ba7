"""Calls on a GPU as CUDA graphs, timed by its own clock, so that launching doesn't hide what the work costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM_UP = 3  # calls before one is captured, in which libraries choose their kernels


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """A call that replays what `call` did on the current GPU, on the same tensors, without Python.

    Raises RuntimeError where the call waits for the GPU, which no graph can hold.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()  # its memory is the graph's

    def replay(kept: Any = (call, held)) -> None:  # what it reads and writes must stay where it is
        graph.replay()

    return replay


def elapsed(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each call on the GPU, run one after another."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
