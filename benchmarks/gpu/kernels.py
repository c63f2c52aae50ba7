"""Times of every kernel on an NVIDIA GPU, by shape, density and rows, beside cuBLAS and torch's own two of four.

    python -m benchmarks.gpu.kernels [--shapes 4096x11008 ...] [--densities 0.5 ...] [--rows 1 16] [--out figures.svg]

First what the card can do is measured: the bandwidth of copying, read and written, and the rate of a large product of
bfloat16. A figure is the median over rounds of a replayed graph that holds one product for each of several copies of
the matrix, together larger than the L2 cache, so that each is fetched from memory as in a whole model. All ways of one
shape and rows are timed in turn in each round. What a product gives is compared with float32 before it is timed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import record
from compress.bits import pack
from compress.errors import TargetError
from compress.replay import captured, elapsed
from compress.sparse import gpu  # noqa: F401  # define the operators
from compress.sparse.bsr import SIDES, Bsr
from compress.sparse.device import kernels_on
from compress.sparse.formats import Bitmap
from compress.sparse.semi import SemiInt4

SHAPES = ("768x768", "768x3072", "3072x768", "4096x4096", "4096x11008", "11008x4096", "8192x28672", "28672x8192")
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KIND = torch.bfloat16
ROUNDS = 30
BEYOND = 3  # times the L2 cache that all copies take
MOST_COPIES = 64

Product = Callable[[Tensor], Tensor]


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), type=shape_of, help="outputs x inputs")
    made.add_argument("--densities", nargs="+", default=list(DENSITIES), type=float)
    made.add_argument("--rows", nargs="+", default=list(ROWS), type=int)
    made.add_argument("--out", type=Path, help="an SVG of times over the floor and of densities that break even")
    return made.parse_args(arguments)


def shape_of(text: str) -> tuple[int, int]:
    """Outputs and inputs of 4096x11008."""
    outputs, _, inputs = text.partition("x")
    return int(outputs), int(inputs)


def require_gpu() -> str:
    """The card's name; raises TargetError where there is none, or its kernels can't be had."""
    if not torch.cuda.is_available():
        raise TargetError("no CUDA device found; expected an NVIDIA GPU of generation 8.0 or newer")
    if kernels_on(torch.device("cuda")) is None:
        raise TargetError("the kernels can't be compiled for this GPU; expected nvcc on PATH")
    return torch.cuda.get_device_name()


def ways(weight: Tensor, density: float | None) -> Iterator[tuple[str, Product, int]]:
    """Each way to multiply by matrices of this shape: its name, the product, and the bytes it must fetch."""
    size = weight.numel()
    if density is not None:
        kept = weight * (torch.rand(weight.shape, device=weight.device) < density)
        packed = Bitmap.pack(kept)
        yield "bitmap", _of("bitmap_linear", packed.tensors()), packed.bytes
        for side in SIDES:
            tiles = Bsr.pack(tiled(weight, density, side), side)
            outputs = weight.shape[0]
            yield f"bsr_{side}", _of("bsr_linear", tiles.tensors(), outputs), tiles.bytes
        return
    yield "dense", partial(F.linear, weight=weight), 2 * size
    halved = two_of_four(weight)
    semi = SemiInt4.pack(halved)
    yield "semi_int4", _of("semi_int4_linear", semi.tensors()), semi.bytes
    if weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0:
        theirs = torch.sparse.to_sparse_semi_structured(halved)
        yield "torch_2_4", partial(F.linear, weight=theirs), size * 9 // 8
    bits, scale = pack(weight), weight.float().abs().mean(1)
    yield "signs", _of("signs_linear", {"bits": bits, "scale": scale}), bits.numel() + 4 * len(bits)


def matrix_of(name: str, weight: Tensor, density: float | None) -> Tensor:
    """The dense matrix, in float32, that a way multiplies by; drawn as `ways` draws where the seed is the same."""
    if name == "bitmap" and density is not None:
        return (weight * (torch.rand(weight.shape, device=weight.device) < density)).float()
    if name.startswith("bsr_") and density is not None:
        return tiled(weight, density, int(name.removeprefix("bsr_"))).float()
    if name == "semi_int4":
        return SemiInt4.pack(two_of_four(weight)).unpack().float()
    if name == "torch_2_4":
        return two_of_four(weight).float()
    if name == "signs":
        return torch.where(weight > 0, 1.0, -1.0) * weight.float().abs().mean(1, keepdim=True)
    return weight.float()


def tiled(weight: Tensor, density: float, side: int) -> Tensor:
    """The matrix with that share of its tiles."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(side)
    kept = torch.rand(-(-rows // side), -(-columns // side), generator=generator).to(weight.device) < density
    return weight * kept.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns]


def two_of_four(weight: Tensor) -> Tensor:
    """The matrix with the two largest of each four inputs."""
    runs = weight.unflatten(1, (-1, 4))
    least = runs.abs().argsort(2)[..., :2]
    return runs.scatter(2, least, 0.0).flatten(1)


def worst_error(met: Tensor, x: Tensor, weight: Tensor) -> float:
    """The largest error as a share of the sum of magnitudes."""
    wide = x.double()
    exact, most = wide @ weight.double().T, wide.abs() @ weight.double().abs().T
    return float(((met.double() - exact).abs() / most.clamp(min=1e-30)).max())


def milliseconds(calls: Mapping[str, tuple[Callable[[], Any], int]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Times of one product, of calls that each hold so many, one after another in an order that changes."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    for done in range(rounds + 1):
        shuffle.shuffle(order)
        for name, took in zip(order, elapsed([calls[name][0] for name in order]), strict=True):
            if done:
                samples[name].append(took / calls[name][1])
    return samples


def told(samples: Sequence[float]) -> dict[str, float]:
    """Median, and the tenth and ninetieth percentile."""
    low, middle, high = np.percentile(samples, (10, 50, 90))
    return {"milliseconds": float(middle), "p10": float(low), "p90": float(high)}


def abilities(rounds: int = ROUNDS) -> dict[str, float]:
    """Bytes a second of copying, read and written, and operations a second of a product of bfloat16."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=KIND) for _ in range(2))
    calls = {"copy": (captured(partial(target.copy_, source)), 1), "gemm": (captured(partial(torch.mm, a, b)), 1)}
    times = {name: float(np.median(found)) / 1e3 for name, found in milliseconds(calls, rounds).items()}
    return {"copy_bytes_a_second": 2 * source.numel() / times["copy"],
            "gemm_operations_a_second": 2 * side**3 / times["gemm"]}  # fmt: skip


def timed(shape: tuple[int, int], densities: Sequence[float], rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row of figures for every way, density and number of rows of one shape."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    for density in (None, *densities):
        made: dict[str, list[tuple[Product, int]]] = {}
        seed, copies = 0, 1
        while seed < copies:
            weight = drawn(shape, seed)
            for name, product, size in ways(weight, density):
                made.setdefault(name, []).append((product, size))
                copies = max(copies, min(MOST_COPIES, -(-BEYOND * cache // size)))
            seed += 1
        for count in rows:
            x = torch.randn(count, shape[1], device="cuda", dtype=KIND)
            calls: dict[str, tuple[Callable[[], Any], int]] = {}
            errors = {}
            for name, held in made.items():
                weight = drawn(shape, 0)
                errors[name] = worst_error(held[0][0](x), x, matrix_of(name, weight, density))
                products = [product for product, _ in held]
                calls[name] = (captured(lambda products=products, x=x: [one(x) for one in products]), len(products))
            for name, samples in milliseconds(calls).items():
                size = made[name][0][1] + 2 * count * sum(shape)
                yield {"way": name, "outputs": shape[0], "inputs": shape[1], "density": density, "rows": count,
                       "bytes": size, "worst_error": errors[name], **told(samples)}  # fmt: skip


def drawn(shape: tuple[int, int], seed: int) -> Tensor:
    """The matrix of a seed; what is drawn after it is of the seed too."""
    torch.manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=KIND)


def _of(name: str, held: Mapping[str, Tensor], *more: int) -> Product:
    operator = getattr(torch.ops.hf_compress, name)
    return lambda x: operator(x, *held.values(), *more, None)


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Times over what the bytes take at the bandwidth of copying; and densities below which a bitmap beats dense."""
    from matplotlib.figure import Figure

    rows, speed = figures["rows"], figures["abilities"]["copy_bytes_a_second"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    one = [row for row in rows if row["rows"] == min(row["rows"] for row in rows)]
    for way in dict.fromkeys(row["way"] for row in one):
        mine = [row for row in one if row["way"] == way]
        over = [row["milliseconds"] / 1e3 * speed / row["bytes"] for row in mine]
        left.scatter([row["bytes"] for row in mine], over, label=way, s=14)
    left.set(xscale="log", yscale="log", xlabel="bytes", ylabel="time over the floor")
    left.legend()
    even = break_even(rows)
    for shape in dict.fromkeys((outputs, inputs) for outputs, inputs, _ in even):
        points = sorted((count, density) for (*other, count), density in even.items() if tuple(other) == shape)
        right.plot(*zip(*points, strict=True), marker="o", label="x".join(map(str, shape)))
    right.set(xscale="log", xlabel="rows", ylabel="density that breaks even", ylim=(0, 1))
    right.legend()
    figure.savefig(path)


def break_even(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int, int], float]:
    """By outputs, inputs and rows: the largest density at which a bitmap was not slower than dense; 0 if none."""
    dense = {(r["outputs"], r["inputs"], r["rows"]): r["milliseconds"] for r in rows if r["way"] == "dense"}
    found = dict.fromkeys(dense, 0.0)
    for row in rows:
        key = (row["outputs"], row["inputs"], row["rows"])
        if row["way"] == "bitmap" and row["milliseconds"] <= dense[key]:
            found[key] = max(found[key], row["density"])
    return found


def main() -> None:
    """Measure and record."""
    asked = parsed()
    try:
        card = require_gpu()
    except TargetError as error:
        raise SystemExit(f"gpu-kernels: {error}") from error
    figures: dict[str, Any] = {"card": card, "abilities": abilities(), "rows": []}
    for shape in asked.shapes:
        figures["rows"] += timed(shape, asked.densities, asked.rows)
        print("x".join(map(str, shape)), flush=True)
    print(record("gpu-kernels", figures))
    if asked.out:
        draw(figures, asked.out)


if __name__ == "__main__":
    main()
