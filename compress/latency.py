"""The latency table: how long each prunable width takes on the target at each size it could be cut to.

One block of each shape is copied out of the model, called as the model calls it, and cut to every size of one of its
axes while its other axes are at their least; the time over that of the least size is the axis's. All these variants
are timed against one another in one process, in the target's runtime (`measure.py`), so the table holds differences
that a whole model is the sum of. An axis that all blocks share is varied in the whole model instead.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from compress.errors import LayoutError, nearest
from compress.layout import Axis, Layout
from compress.measure import interleave, measure
from compress.progress import track
from compress.runtimes import RUNTIMES
from compress.runtimes.onnx import OnnxRuntime
from compress.runtimes.torch import uncached
from compress.target import Target

VERSION = 2  # raised when the same model on the same machine would be measured otherwise
SHRINK = 0.9  # each offered size of a feed-forward layer is about this share of the one before
MOST_MEASURED = 14  # sizes of an axis that are timed; those between are interpolated
MOST_HEADS = 17
MOST_SHARED = 5  # for each size of a shared axis the whole model is built
SECONDS = 15.0


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
    calls = _captured(model, layout, inputs)
    alike: dict[str, list[Axis]] = {}
    for axis in layout.axes.values():
        alike.setdefault(_signature(model, axis, calls[axis.block]), []).append(axis)
    key = json.dumps([VERSION, target.fingerprint(), sorted(alike)], sort_keys=True)
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if file.exists():
        stored = json.loads(file.read_text())["curves"]
    else:
        leaders = {signature: min(axes, key=lambda axis: axis.least) for signature, axes in alike.items()}
        curves = _measured(model, layout, target, leaders, calls, folder)
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


@dataclass(frozen=True)
class Call:
    """How a block was called: its arguments' leaves, tensors among them, and the tree they hang on."""

    leaves: tuple[Any, ...]
    tree: Any

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves that are tensors."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))


class Part(nn.Module):
    """A module that takes the tensors of a call by position, and gives those it returns."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Put the tensors in their places and call the module."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.call.tree)
        outputs = self.module(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _captured(model: PreTrainedModel, layout: Layout, inputs: Mapping[str, Tensor]) -> dict[str, Call]:
    """How each block that has axes of its own is called in one call of the model; under "" the call itself."""
    given = {name: value.clone().to(model.device) for name, value in inputs.items()}
    if "attention_mask" in given:
        given["attention_mask"][:, -1:] = 0  # with nothing masked the blocks would be called without a mask
    calls: dict[str, Call] = {}

    def remember(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, tree = pytree.tree_flatten((args, kwargs))
            calls[block] = Call(tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in leaves), tree)

        return hook

    blocks = {axis.block for axis in layout.axes.values()}
    hooks = [model.get_submodule(b).register_forward_pre_hook(remember(b), with_kwargs=True) for b in sorted(blocks)]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(**given, **uncached(model))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return calls


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
    calls: Mapping[str, Call],
    folder: Path,
) -> dict[str, Curve]:
    """Build every variant once, time all in turn, and take the differences."""
    wanted = {signature: thinned(levels(axis), _most(axis)) for signature, axis in leaders.items()}
    variants: dict[tuple[str, tuple[tuple[str, int], ...]], int] = {}

    def index(axis: Axis, size: int) -> int:
        least = {
            other.name: other.least for other in layout.axes.values() if other.block == axis.block or not axis.block
        }
        sizes = tuple(sorted({**least, axis.name: size}.items()))
        return variants.setdefault((axis.block, sizes), len(variants))

    places = {s: [index(leaders[s], size) for size in sizes] for s, sizes in wanted.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        runtime = RUNTIMES[target.chosen]
        cut = (_cut(model, layout, block, dict(sizes)) for block, sizes in variants)
        parts = (Part(part, calls[block]) for part, (block, _) in zip(cut, variants, strict=True))
        tracked = track(parts, "latency table: building", total=len(variants))
        if isinstance(runtime, OnnxRuntime):
            built = [
                runtime.build_module(
                    part.cpu(), [tensor.cpu() for tensor in part.call.tensors], Path(scratch, f"{i}.onnx")
                )
                for i, part in enumerate(tracked)
            ]
            times = [timing.milliseconds for timing in measure(built, target, seconds=SECONDS)]
        else:
            times = _timed_here(list(tracked), target)
    return {s: Curve.of(wanted[s], [times[i] for i in places[s]], levels(leaders[s])) for s in leaders}


def _cut(model: PreTrainedModel, layout: Layout, block: str, sizes: Mapping[str, int]) -> nn.Module:
    """A copy of a block, or of the model, cut to the given sizes; other blocks are not copied."""
    if block:
        shell: Any = nn.Module()
        shell.config, shell.base_model_prefix = copy.deepcopy(model.config), model.base_model_prefix
        *parents, leaf = block.split(".")
        inner = shell
        for name in parents:
            inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        inner.add_module(leaf, copy.deepcopy(model.get_submodule(block)))
    else:
        shell = copy.deepcopy(model)
    for name, size in sizes.items():
        layout = layout.cut(shell, name, range(size))
    return shell.get_submodule(block).eval()


def _timed_here(parts: Sequence[Part], target: Target) -> list[float]:
    """Median milliseconds of parts in torch, in this process: a part has no artifact that another could open."""
    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)

    def call(part: Part) -> Callable[[], None]:
        part = part.to(target.device)
        tensors = [tensor.to(target.device) for tensor in part.call.tensors]

        def run() -> None:
            part(*tensors)
            if target.device == "cuda":
                torch.cuda.synchronize()

        return run

    try:
        with torch.inference_mode():
            samples = interleave([call(part) for part in parts], seconds=SECONDS)
    finally:
        torch.set_num_threads(before)
    return [float(np.median(times)) for times in samples]
