"""The gate: what each layer takes dense and packed, so that only those are packed that gain by it.

All layers run in turn, as in the model, first as one candidate and then as the next: so each finds its weights as far
away as it would find them there. A layer's time is the median over rounds.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.sparse.modules import SparseLinear, Stored

Calls = Mapping[str, Callable[[Tensor], Tensor]]  # by layer


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


def milliseconds(
    candidates: Mapping[str, Calls], inputs: Mapping[str, int], rows: int, threads: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each layer by candidate, called with (rows, inputs of the layer) on so many threads.

    Rounds go on for so many seconds, and there are at least five.
    """
    generator = torch.Generator().manual_seed(0)
    given = {width: torch.randn(rows, width, generator=generator) for width in set(inputs.values())}
    times: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in calls} for kind, calls in candidates.items()
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for done in _rounds(seconds):
                for kind, calls in candidates.items():
                    for name, call in calls.items():
                        start = time.perf_counter()
                        call(given[inputs[name]])
                        if done:  # the first round makes ready
                            times[kind][name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return {kind: _medians(found) for kind, found in times.items()}


def _rounds(seconds: float, fewest: int = 6) -> Iterator[int]:
    """Numbers of rounds, until the time is up."""
    end = time.monotonic() + seconds
    for done in itertools.count():
        if done >= fewest and time.monotonic() > end:
            return
        yield done


def _medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.median(samples)) * 1e3 for name, samples in times.items()}
