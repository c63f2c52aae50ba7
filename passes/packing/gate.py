"""The gate: what each layer takes dense and packed, so that only those are packed that gain by it.

All layers run in turn, as in the model, first as one candidate and then as the next: so each finds its weights as far
away as it would find them there. A layer's time is the median over rounds. On a GPU it is that of a replayed graph.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.replay import captured, elapsed
from compress.sparse.bsr import Bsr
from compress.sparse.modules import SparseLinear, Stored
from compress.sparse.semi import in_fours

Calls = Mapping[str, Callable[[Tensor], Tensor]]  # by layer
Ready = Mapping[str, Mapping[str, Callable[[], Any]]]  # by candidate and layer


def dense_calls(layers: Mapping[str, tuple[Tensor, Tensor | None]]) -> Calls:
    """The products of dense layers, each a matrix (out, in) with its bias."""
    return {name: partial(F.linear, weight=weight, bias=bias) for name, (weight, bias) in layers.items()}


def int8_calls(layers: Mapping[str, tuple[Tensor, Tensor | None]]) -> Calls:
    """The same by torch's products of int8 with dynamic ranges; empty where this build of torch has none."""
    if torch.backends.quantized.engine == "none":
        return {}
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it will go one day, and is the fastest there is until then
        for name, (weight, bias) in layers.items():
            scale = weight.abs().amax(1).clamp(min=1e-12) / 127
            zeros = torch.zeros(len(weight), dtype=torch.long)
            codes = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
            made[name] = torch.ops.quantized.linear_prepack(codes, bias)
    product = torch.ops.quantized.linear_dynamic
    return {name: partial(product, W_prepack=held) for name, held in made.items()}


def packed_calls(packed: Mapping[str, Stored], layers: Mapping[str, tuple[Tensor, Tensor | None]]) -> Calls:
    """The products of packed layers."""
    modules: dict[str, nn.Module] = {name: SparseLinear(one, layers[name][1]) for name, one in packed.items()}
    return {name: module.__call__ for name, module in modules.items()}


def two_of_four_calls(layers: Mapping[str, tuple[Tensor, Tensor | None]]) -> Calls:
    """The products of torch's own two of four, for those layers on a GPU whose zeros and sizes allow it."""
    return {
        name: partial(F.linear, weight=torch.sparse.to_sparse_semi_structured(weight), bias=bias)
        for name, (weight, bias) in layers.items()
        if weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0 and in_fours(weight)
    }


def tiled_calls(packed: Mapping[str, Stored], layers: Mapping[str, tuple[Tensor, Tensor | None]], rows: int) -> Calls:
    """The products of torch's own tiles, for those layers packed in tiles whose sizes, and whose rows, fill them."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, one in packed.items():
        if isinstance(one, Bsr) and not any(size % one.side for size in (*one.shape, rows)):
            weight, bias = layers[name]
            found[name] = partial(F.linear, weight=weight.to_sparse_bsr((one.side, one.side)), bias=bias)
    return found


def milliseconds(
    candidates: Mapping[str, Calls], inputs: Mapping[str, int], rows: int, threads: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each layer by candidate, called with (rows, inputs of the layer) on so many threads.

    Rounds go on for so many seconds, and there are at least five.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return _in_turn(_given(candidates, inputs, rows, "cpu", torch.float32), _elapsed_here, seconds)
    finally:
        torch.set_num_threads(before)


def milliseconds_on_gpu(
    packed: Mapping[str, Stored],
    layers: Mapping[str, tuple[Tensor, Tensor | None]],
    rows: int,
    kind: torch.dtype,
    seconds: float,
) -> dict[str, dict[str, float]]:
    """The same on the GPU, where all compute with sixteen bits: packed, by cuBLAS, and by torch's own zeros."""
    placed = {
        name: (weight.to("cuda", kind), None if bias is None else bias.to("cuda", kind))
        for name, (weight, bias) in layers.items()
    }
    modules = {name: SparseLinear(one, placed[name][1]).to("cuda") for name, one in packed.items()}
    candidates: dict[str, Calls] = {
        "packed": {name: module.__call__ for name, module in modules.items()},
        "dense": dense_calls(placed),
        "torch_2_4": two_of_four_calls(placed),
        "torch_bsr": tiled_calls(packed, placed, rows) if find_spec("triton") else {},
    }
    widths = {name: one.shape[1] for name, one in packed.items()}
    with torch.inference_mode():
        given = _given(candidates, widths, rows, "cuda", kind)
        ready = {way: {name: captured(call) for name, call in calls.items()} for way, calls in given.items() if calls}
        return _in_turn(ready, elapsed, seconds)


def _given(
    candidates: Mapping[str, Calls], inputs: Mapping[str, int], rows: int, device: str, kind: torch.dtype
) -> Ready:
    """Every call with its input."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        width: torch.randn(rows, width, generator=generator).to(device, kind) for width in sorted(set(inputs.values()))
    }
    return {way: {name: partial(call, drawn[inputs[name]]) for name, call in calls.items()}
            for way, calls in candidates.items()}  # fmt: skip


def _in_turn(
    ready: Ready, times_of: Callable[[Sequence[Callable[[], Any]]], list[float]], seconds: float
) -> dict[str, dict[str, float]]:
    """Medians of what `times_of` tells of all calls of a candidate, one candidate after another."""
    times: dict[str, list[list[float]]] = {way: [] for way in ready}
    for done in _rounds(seconds):
        for way, calls in ready.items():
            found = times_of(list(calls.values()))
            if done:  # the first round makes ready
                times[way].append(found)
    return {
        way: dict(zip(calls, np.median(np.asarray(times[way]), axis=0).tolist(), strict=True))
        for way, calls in ready.items()
    }


def _elapsed_here(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each call, one after another."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _rounds(seconds: float, fewest: int = 6) -> Iterator[int]:
    """Numbers of rounds, until the time is up."""
    end = time.monotonic() + seconds
    for done in itertools.count():
        if done >= fewest and time.monotonic() > end:
            return
        yield done
