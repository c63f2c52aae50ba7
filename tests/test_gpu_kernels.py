"""Kernels for GPUs: their own sources run on the CPU, lane by lane, and where there is a GPU there.

Each must agree with the dense product of the matrix unpacked, to the rounding of sums in float32 and of the result.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import kernels as benchmark
from compress import bits as counting
from compress.errors import LayoutError
from compress.sparse import device, gpu
from compress.sparse.device import Kernels, built
from compress.sparse.formats import Bitmap
from compress.sparse.semi import SemiInt4
from passes.packing import gate

ROWS = (1, 2, 7, 16, 33)
SIZES = ((1, 1), (5, 7), (16, 32), (17, 100), (40, 257), (33, 1300))
HALVES = (torch.bfloat16, torch.float16)
POISON = 12345.0
SUMMED = 2**-18  # of the sum of magnitudes, what rounding sums of float32 may cost


class Watched:
    """Calls a kernel with its result poisoned; what it reads outside of what it was given fails."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def __call__(self, name: str, result: Tensor, *arguments: device.Argument) -> Tensor:
        library = self.kernels.library
        library.hf_compress_emulated_announce(None, ctypes.c_long(0))
        for one in arguments:
            if isinstance(one, Tensor) and one.numel():
                size = ctypes.c_long(one.numel() * one.element_size())
                library.hf_compress_emulated_announce(ctypes.c_void_p(one.data_ptr()), size)
        self.kernels(name, result.fill_(POISON), *arguments)
        assert library.hf_compress_emulated_violations() == 0
        return result


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(outputs: int, inputs: int, density: float, kind: torch.dtype) -> Tensor:
    """A matrix with zeros of both signs, an empty and a full row among the others where it has so many."""
    seed = 1000 * outputs + inputs
    kept = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < density
    weight = draw(seed, outputs, inputs) * kept
    if outputs > 2:
        weight[1], weight[2] = -0.0, draw(seed + 1, inputs)
    return weight.to(kind)


def semi(outputs: int, inputs: int, kind: torch.dtype) -> Tensor:
    """A matrix of which at most two of four inputs have weights."""
    weight = sparse(outputs, -(-inputs // 4) * 4, 0.8, kind).unflatten(1, (-1, 4))
    rank = draw(inputs, *weight.shape).argsort(2)
    return weight.masked_fill(rank > 1, 0).flatten(1)[:, :inputs].contiguous()


def given(rows: int, inputs: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of x, which begin where no load of sixteen bytes may, and a bias of forty outputs."""
    return draw(rows, rows * inputs + 1).to(kind)[1:].view(rows, inputs), draw(7, 40).to(kind)


def assert_near(met: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """As near as sums of float32 are, each rounded once to its type."""
    wide, matrix = x.double(), weight.double()
    exact, most = wide @ matrix.T, wide.abs() @ matrix.abs().T
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    assert met.shape == exact.shape
    kind = torch.finfo(met.dtype)
    rounding = (exact.abs() * kind.eps / 2).clamp(min=kind.smallest_normal * kind.eps)
    off = (met.double() - exact).abs() - rounding - SUMMED * most
    assert float(off.max()) <= 0


@pytest.mark.parametrize("kind", HALVES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_bitmap_is_the_dense_product(lanes, outputs: int, inputs: int, density: float, kind: torch.dtype) -> None:
    weight = sparse(outputs, inputs, density, kind)
    packed = Bitmap.pack(weight)
    for rows in ROWS[:2] if inputs > 1000 else ROWS:
        x, bias = given(rows, inputs, kind)
        bias = bias[:outputs] if rows % 2 else None
        met = gpu.bitmap_product(Watched(lanes), x, packed, bias)
        assert met.dtype == kind
        assert_near(met, x, weight, bias)


@pytest.mark.parametrize("kind", HALVES, ids=str)
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_semi_int4_is_the_dense_product_of_what_is_stored(lanes, outputs, inputs, group, kind) -> None:
    packed = SemiInt4.pack(semi(outputs, inputs, kind), group, kind)
    for rows in (2, 17) if inputs > 1000 else ROWS:
        x, bias = given(rows, inputs, kind)
        bias = bias[:outputs] if rows % 2 else None
        met = gpu.semi_int4_product(Watched(lanes), x, packed, bias)
        assert_near(met, x, packed.unpack(), bias)


@pytest.mark.parametrize("kind", HALVES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_signs_times_numbers_is_the_dense_product(lanes, outputs: int, inputs: int, kind: torch.dtype) -> None:
    signs, scale = draw(inputs, outputs, inputs), draw(3, outputs).abs()
    weight = torch.where(signs > 0, 1.0, -1.0) * scale[:, None]
    for rows in (2, 7) if inputs > 1000 else ROWS:
        x, bias = given(rows, inputs, kind)
        bias = bias[:outputs] if rows % 2 else None
        met = gpu.signs_linear_product(Watched(lanes), x, counting.pack(signs), scale, bias)
        assert_near(met, x, weight, bias)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("m", "n", "count"), [(1, 1, 1), (7, 65, 33), (66, 5, 100), (3, 70, 600)])
def test_counting_bits_is_exact(lanes, lead: tuple[int, ...], m: int, n: int, count: int) -> None:
    a, b = (counting.pack(draw(seed, *lead, rows, count)) for seed, rows in ((1, m), (2, n)))
    assert torch.equal(gpu.counted_product(Watched(lanes), a, b, count), counting.signs_product(a, b, count))
    assert torch.equal(gpu.counted_product(Watched(lanes), a, b, None), counting.seen_product(a, b))


@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_the_largest_numbers_and_not_a_number(lanes, kind: torch.dtype) -> None:
    weight = sparse(16, 64, 0.5, kind).sign() * torch.finfo(kind).max
    x = torch.full((3, 64), 2.0**-8, dtype=kind)
    x[2, 5] = torch.nan
    met = gpu.bitmap_product(Watched(lanes), x, Bitmap.pack(weight))
    fits = (x[:2].double() @ weight.double().T).abs() <= torch.finfo(kind).max
    assert fits.any()
    exact = x[:2].double() @ weight.double().T
    assert bool(((met[:2].double() - exact).abs() <= 2**-9 * (x[:2].double() @ weight.double().abs().T))[fits].all())
    assert met[2].isnan().all()


@pytest.mark.parametrize("kind", HALVES, ids=str)
@pytest.mark.parametrize("inputs", [64, 100, 1300])
def test_rounding_to_four_bits_keeps_places_and_is_off_by_half_a_step(inputs: int, kind: torch.dtype) -> None:
    weight = semi(9, inputs, kind)
    packed = SemiInt4.pack(weight, 64, kind)
    met = packed.unpack()
    assert met.dtype == kind
    assert not (met[weight == 0] != 0).any()
    step = packed.scale.float().repeat_interleave(64, 1)[:, :inputs]
    assert bool(((met.float() - weight.float()).abs() <= 0.53 * step).all())
    assert packed.problem() == ""
    hollow = SemiInt4.hollow(packed.shape, packed.group, kind)
    assert {n: (t.shape, t.dtype) for n, t in hollow.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in packed.tensors().items()
    }
    packed.positions[0, 0] = 0
    assert "ascend" in packed.problem()
    if inputs == 1300:
        assert 8 * packed.bytes / (9 * packed.width) == 3 + 16 / 64


def test_what_can_not_be_packed_is_told() -> None:
    with pytest.raises(LayoutError, match="groups of 96 inputs; expected a multiple of 64"):
        SemiInt4.pack(torch.zeros(2, 96), 96)
    with pytest.raises(LayoutError, match="row 0 has more than 2 of 4"):
        SemiInt4.pack(torch.ones(2, 64))


def operands() -> dict[str, tuple]:
    """Arguments of every operator."""
    bits = counting.pack(draw(0, 6, 100))
    held, kept = SemiInt4.pack(semi(6, 100, torch.bfloat16)), Bitmap.pack(sparse(6, 100, 0.5, torch.bfloat16))
    return {
        "bitmap_linear": (
            draw(1, 3, 2, 100),
            *kept.tensors().values(),
            None,
        ),
        "semi_int4_linear": (draw(1, 3, 2, 100), *held.tensors().values(), draw(2, 6)),
        "signs_linear": (draw(1, 3, 2, 100), bits, draw(2, 6), None),
        "signs_product": (bits, bits, 100),
        "seen_product": (bits[None], bits[None]),
    }


@pytest.mark.parametrize("name", operands())
def test_operators_keep_what_torch_asks_of_them(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.hf_compress, name), operands()[name])


@pytest.mark.parametrize("name", ["signs_product", "seen_product"])
def test_counting_is_what_floats_give(name: str) -> None:
    arguments = operands()[name]
    reference = gpu._signs if name == "signs_product" else gpu._seen
    assert torch.equal(getattr(torch.ops.hf_compress, name)(*arguments), reference(*arguments))


def test_without_nvcc_it_is_told_what_lacks(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    device._kernels.cache_clear()
    assert device._kernels(9, 0) is None
    assert "no nvcc found" in capsys.readouterr().err
    assert device._kernels(7, 5) is None
    assert "expected 8.0 or newer" in capsys.readouterr().err
    device._kernels.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
@pytest.mark.slow
def test_nvcc_compiles_every_kernel_once(tmp_path: Path) -> None:
    for capability in ((8, 0), (9, 0)):
        path = built(tmp_path, device.command(*capability))
        made = path.stat().st_mtime_ns
        assert built(tmp_path, device.command(*capability)).stat().st_mtime_ns == made
        symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
        assert {f"hf_compress_{name}" for name in ("bitmap", "bsr", "semi", "signs_linear", "counted")} <= set(
            symbols.split()
        )
    assert len(list(tmp_path.iterdir())) == 2


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def on_gpu(name: str, rows: int, outputs: int, inputs: int, density: float, kind: torch.dtype):
    """What a kernel multiplies, on the GPU: a call of it, and the matrix that it should have multiplied by."""
    x = given(rows, inputs, kind)[0].cuda()
    if name == "semi_int4_linear":
        packed = SemiInt4.pack(semi(outputs, inputs, kind), 64, kind)
        held, weight = packed.tensors().values(), packed.unpack()
    elif name == "bitmap_linear":
        weight = sparse(outputs, inputs, density, kind)
        held = Bitmap.pack(weight).tensors().values()
    else:
        signs, scale = draw(inputs, outputs, inputs), draw(3, outputs).abs()
        held, weight = (counting.pack(signs), scale), torch.where(signs > 0, 1.0, -1.0) * scale[:, None]
    tensors = [one.cuda() for one in held]
    return x, lambda: getattr(torch.ops.hf_compress, name)(x, *tensors, None), weight


LINEAR = ("bitmap_linear", "semi_int4_linear", "signs_linear")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", HALVES, ids=str)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [*SIZES, (768, 3072), (1000, 4100)])
def test_on_a_gpu_kernels_agree_with_float32(name: str, outputs: int, inputs: int, rows: int, kind) -> None:
    for density in (0.1, 0.5, 1.0):
        x, call, weight = on_gpu(name, rows, outputs, inputs, density, kind)
        torch.empty(rows, outputs, dtype=kind, device="cuda").fill_(POISON)  # likely where the result will lie
        assert_near(call().cpu(), x.cpu(), weight)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", LINEAR)
def test_on_a_gpu_any_stream_and_a_graph_give_the_same(name: str) -> None:
    x, call, _ = on_gpu(name, 3, 100, 1300, 0.5, torch.bfloat16)
    expected = call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        beside = call()
    stream.synchronize()
    assert torch.equal(beside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.fill_(POISON)
    graph.replay()
    assert torch.equal(captured, expected)
    x.neg_()
    graph.replay()
    assert torch.equal(captured, -expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("count", [33, 64, 1000])
def test_on_a_gpu_counting_bits_is_exact(count: int) -> None:
    a, b = (counting.pack(draw(seed, 2, rows, count)) for seed, rows in ((1, 70), (2, 130)))
    met = torch.ops.hf_compress.signs_product(a.cuda(), b.cuda(), count)
    assert torch.equal(met.cpu(), counting.signs_product(a, b, count))
    assert torch.equal(torch.ops.hf_compress.seen_product(a.cuda(), b.cuda()).cpu(), counting.seen_product(a, b))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_every_way_to_compute_a_layer_is_timed() -> None:
    weight = semi(128, 256, torch.bfloat16)
    times = gate.milliseconds_on_gpu({"a": Bitmap.pack(weight)}, {"a": (weight, None)}, 3, torch.bfloat16, 0.01)
    assert times.keys() == {"packed", "dense", "torch_2_4"}
    assert all(0 < took["a"] < 1e3 for took in times.values())


# The benchmark.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kernels"])
    with pytest.raises(SystemExit, match="gpu-kernels: no CUDA device found"):
        benchmark.main()


def test_break_even_is_the_largest_density_that_is_not_slower() -> None:
    def row(way: str, density: float | None, milliseconds: float) -> dict[str, object]:
        return {"way": way, "outputs": 2, "inputs": 3, "rows": 1, "density": density, "milliseconds": milliseconds}

    rows = [row("dense", None, 2.0), row("bitmap", 0.9, 2.1), row("bitmap", 0.5, 1.9), row("bitmap", 0.1, 1.0)]
    assert benchmark.break_even(rows) == {(2, 3, 1): 0.5}
    assert benchmark.break_even(rows[:2]) == {(2, 3, 1): 0.0}


@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_the_benchmark_leaves_the_two_largest_of_four(kind: torch.dtype) -> None:
    met = benchmark.two_of_four(torch.tensor([[1.0, -4, 3, 2, 0, 5, -6, 1]], dtype=kind))
    assert met.tolist() == [[0, -4, 3, 0, 0, 5, -6, 0]]
