"""The latency table: how long each prunable width takes on the target at each size it could be cut to.

One block of each shape is copied out of the model, called as the model calls it, and cut to every size of one of its
axes while its other axes are at their least; the time over that of the least size is the axis's. All sizes of an axis
are timed against one another in one process, in the target's runtime (`measure.py`), so the table holds differences
that a whole model is the sum of. An axis that all blocks share is varied in the whole model instead.

Where the target generates, a time is that of the prompt plus as many steps of one token as the target has.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from compress import replay
from compress.errors import LayoutError, nearest
from compress.layout import Axis, Layout
from compress.measure import FEWEST_ROUNDS, interleave, measure
from compress.parts import Call, Part, captured, cut, part
from compress.progress import track
from compress.runtimes import RUNTIMES
from compress.runtimes.torch import TorchRuntime
from compress.target import Target

VERSION = 6  # raised when the same model on the same machine would be measured otherwise
SHRINK = 0.9  # each offered size of a feed-forward layer is about this share of the one before
MOST_MEASURED = 14  # sizes of an axis that are timed; those between are interpolated
MOST_HEADS = 17
MOST_SHARED = 5  # for each size of a shared axis the whole model is built
SECONDS = 15.0

# What a request is made of: how often, the calls of the blocks, and the calls that fill their caches before.
Requests = Sequence[tuple[float, Mapping[str, Call], Mapping[str, Call] | None]]


@dataclass(frozen=True)
class Curve:
    """Milliseconds over size of one axis: `raw` as measured at `sizes`, `milliseconds` with noise kept from falling.

    `offered` are the sizes worth cutting to; those not among `sizes` are interpolated.
    """

    sizes: tuple[int, ...]
    raw: tuple[float, ...]
    milliseconds: tuple[float, ...]
    offered: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], times: Sequence[float], offered: Sequence[int]) -> Curve:
        """From the times of the variants: the least size is where the axis takes no time."""
        raw = np.asarray(times) - times[0]
        rising = np.maximum.accumulate(np.maximum(raw, 0.0))
        return cls(tuple(sizes), tuple(raw.tolist()), tuple(rising.tolist()), tuple(offered))


@dataclass(frozen=True)
class Table:
    """Milliseconds of every axis of one model at every size, on one target."""

    curves: Mapping[str, Curve]

    def milliseconds(self, axis: str, size: int) -> float:
        """Time that the axis takes at `size` units; nothing once it is gone."""
        curve = self._curve(axis)
        return float(np.interp(size, curve.sizes, curve.milliseconds))

    def sizes(self, axis: str) -> list[int]:
        """The sizes worth cutting to, rising, from the least to the present one."""
        return list(self._curve(axis).offered)

    def _curve(self, axis: str) -> Curve:
        if axis not in self.curves:
            raise LayoutError(f"no times for axis '{axis}'{nearest(axis, self.curves)}")
        return self.curves[axis]


def table(model: PreTrainedModel, layout: Layout, target: Target, inputs: Mapping[str, Tensor], folder: Path) -> Table:
    """Measure the table of a model at its present sizes, or read it from `folder`.

    `inputs` are one call of the model at the target's batch and sequence. A stored table is read only where machine,
    versions, target and shapes are all equal.
    """
    RUNTIMES[target.chosen].require()
    requests = _requests(model, layout, target, inputs)
    calls = requests[0][1]
    alike: dict[str, list[Axis]] = {}
    for axis in layout.axes.values():
        if not axis.units:  # its modules are gone
            continue
        alike.setdefault(_signature(model, axis, calls[axis.block]), []).append(axis)
    key = json.dumps([VERSION, target.fingerprint(), sorted(alike)], sort_keys=True)
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if file.exists():
        stored = json.loads(file.read_text())["curves"]
    else:
        leaders = {signature: min(axes, key=lambda axis: axis.least) for signature, axes in alike.items()}
        curves = _measured(model, layout, target, leaders, requests, folder)
        stored = {signature: asdict(curve) for signature, curve in curves.items()}
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"key": json.loads(key), "curves": stored}, indent=1))
        unfinished.rename(file)
    read = {signature: Curve(**{name: tuple(values) for name, values in c.items()}) for signature, c in stored.items()}
    return Table({axis.name: read[signature] for signature, axes in alike.items() for axis in axes})


def levels(axis: Axis) -> list[int]:
    """Sizes to offer, rising: every count of heads, or about `SHRINK` from one to the next on round numbers."""
    if axis.kind == "heads":
        return sorted({axis.units, *range(axis.least, axis.units + 1)})
    step = step_of(axis.units)
    found, size = {axis.least, axis.units}, float(axis.units)
    while (size := size * SHRINK) >= step:
        found.add(max(axis.least, int(size) // step * step))
    return sorted(found)


def step_of(columns: int) -> int:
    """The step, of 8 to 64, that sizes of so many columns should lie on, or 1 where there are few.

    Matrix kernels work in such steps, and a width off them costs as much as the next step.
    """
    return next((step for step in (64, 32, 16, 8) if columns >= 32 * step), 1)


def thinned(sizes: Sequence[int], most: int) -> list[int]:
    """At most `most` of the sizes, evenly chosen, the first and last among them."""
    if len(sizes) <= most:
        return list(sizes)
    return [sizes[i] for i in sorted({round(i) for i in np.linspace(0, len(sizes) - 1, most)})]


def _most(axis: Axis) -> int:
    """How many sizes of an axis are timed."""
    if not axis.block:
        return MOST_SHARED
    return MOST_HEADS if axis.kind == "heads" else MOST_MEASURED


def _requests(model: PreTrainedModel, layout: Layout, target: Target, inputs: Mapping[str, Tensor]) -> Requests:
    """The calls of all blocks that make up what the target asks.

    Where the target generates, the steps of one token are all timed after a past of middle length, as their times grow
    by the same with every token.
    """
    blocks = {axis.block for axis in layout.axes.values()}
    if target.generate is None:
        return [(1.0, captured(model, blocks, inputs), None)]
    steps = target.generate - 1
    ids = inputs["input_ids"]
    past = ids.repeat(1, 2 + steps // ids.shape[1])[:, : ids.shape[1] + steps // 2]
    cache = DynamicCache()
    before = captured(model, blocks, {"input_ids": past, "attention_mask": torch.ones_like(past)}, cache)
    mask = torch.ones(len(ids), past.shape[1] + 1, dtype=torch.long)
    after = captured(model, blocks, {"input_ids": ids[:, :1], "attention_mask": mask}, cache)
    prompt = captured(model, blocks, inputs, DynamicCache())
    return [(1.0, prompt, None), (float(steps), after, before)]


def _signature(model: PreTrainedModel, axis: Axis, call: Call) -> str:
    """What the times of an axis depend on: its size, the modules it runs through and the states they are given."""
    modules = [axis.name.rpartition(".")[2], axis.kind, axis.units, axis.least if not axis.block else ""]
    for site in axis.sites:
        module = model.get_submodule(site.module)
        weight = getattr(module, "weight", None)
        modules += [type(module).__name__, site.dim, site.width, None if weight is None else list(weight.shape)]
    states = max((list(tensor.shape) for tensor in call.tensors), key=len, default=[])
    block = model.get_submodule(axis.block) if axis.block else model
    return json.dumps([type(block).__name__, modules, [list(tensor.shape) for tensor in call.tensors[:1]] or states])


def _measured(
    model: PreTrainedModel,
    layout: Layout,
    target: Target,
    leaders: Mapping[str, Axis],
    requests: Requests,
    folder: Path,
) -> dict[str, Curve]:
    """Time the sizes of one axis after another: they are compared with one another alone, and take less memory so."""
    wanted = {signature: thinned(levels(axis), _most(axis)) for signature, axis in leaders.items()}
    seconds = SECONDS / sum(map(len, wanted.values()))  # for each size
    folder.mkdir(parents=True, exist_ok=True)
    curves = {}
    for signature, axis in leaders.items():
        sizes = wanted[signature]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            times = _times(model, layout, target, axis, sizes, requests, Path(scratch), seconds * len(sizes))
        curves[signature] = Curve.of(sizes, times, levels(axis))
    return curves


def _times(
    model: PreTrainedModel,
    layout: Layout,
    target: Target,
    axis: Axis,
    sizes: Sequence[int],
    requests: Requests,
    scratch: Path,
    seconds: float,
) -> list[float]:
    """Milliseconds of a request to the axis' block at each size, its other axes at their least; all timed in turn."""
    least = {other.name: other.least for other in layout.axes.values() if other.block == axis.block or not axis.block}
    parts = (
        part(module, calls[axis.block], before[axis.block] if before else None)
        for size in sizes
        for module in [cut(model, layout, axis.block, {**least, axis.name: size})]
        for _, calls, before in requests
    )
    tracked = track(parts, f"latency table: building {axis.kind}", total=len(sizes) * len(requests))
    runtime = RUNTIMES[target.chosen]
    if not isinstance(runtime, TorchRuntime):
        built = [
            runtime.build_module(one.cpu(), [tensor.cpu() for tensor in one.inputs], scratch / str(i))
            for i, one in enumerate(tracked)
        ]
        once = target.model_copy(update={"generate": None})
        single = [timing.milliseconds for timing in measure(built, once, seconds=seconds)]
    else:
        on_gpu = target.device == "cuda"
        single = _timed_on_gpu(list(tracked), seconds) if on_gpu else _timed_here(list(tracked), target, seconds)
    counts = [count for count, _, _ in requests]
    return (np.reshape(single, (-1, len(requests))) @ counts).tolist()


def _timed_here(parts: Sequence[Part], target: Target, seconds: float) -> list[float]:
    """Median milliseconds of parts in torch, in this process: a part has no artifact that another could open."""
    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        with torch.inference_mode():
            samples = interleave([partial(part, *part.inputs) for part in parts], seconds=seconds)
    finally:
        torch.set_num_threads(before)
    return [float(np.median(times)) for times in samples]


def _timed_on_gpu(parts: Sequence[Part], seconds: float) -> list[float]:
    """The same on a GPU, of replayed graphs, by its own clock: launching a small part takes longer than the part."""
    with torch.inference_mode():
        calls = [
            replay.captured(partial(part.to("cuda"), *[tensor.to("cuda") for tensor in part.inputs])) for part in parts
        ]
        end = time.monotonic() + seconds
        samples: list[list[float]] = []
        while len(samples) < FEWEST_ROUNDS or time.monotonic() < end:
            samples.append(replay.elapsed(calls))
    return [float(middle) for middle in np.median(samples, axis=0)]
