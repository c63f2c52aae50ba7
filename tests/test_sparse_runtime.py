"""The sparse runtime: what is packed comes back bit for bit, and every kernel computes what the dense matrix does."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import onnxruntime
import pytest
import torch
from torch import Tensor

from compress.errors import LayoutError
from compress.sparse import library, ops
from compress.sparse.formats import Bitmap, Blocks, Format, NOfM, round_rows
from compress.sparse.library import FLAGS, built, kernels
from compress.sparse.modules import SparseLinear, as_nodes
from compress.sparse.ops import bitmap_product, blocks_product, blocks_reference

PATHS = library.paths()

SIZES = ((1, 1), (3, 4), (5, 7), (16, 32), (33, 64), (17, 100), (64, 33), (40, 257))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(rows: int, inputs: int, density: float, block: int = 1) -> Tensor:
    """A matrix with runs of zeros, an empty and a full row among the others where it has so many."""
    seed = 1000 * rows + inputs
    runs = -(-inputs // block)
    kept = torch.rand(rows, runs, generator=torch.Generator().manual_seed(seed)) < density
    weight = draw(seed, rows, inputs) * kept.repeat_interleave(block, 1)[:, :inputs]
    if rows > 2:
        weight[1], weight[2] = 0, draw(seed + 1, inputs)
    return weight


def assert_same(one: Format, other: Format) -> None:
    assert one.shape == other.shape
    for name, held in one.tensors().items():
        assert torch.equal(held, other.tensors()[name]), name


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_packing_and_unpacking_are_inverses(size: tuple[int, int], density: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = sparse(*size, density).to(dtype)
        packed = Bitmap.pack(weight)
        assert torch.equal(packed.unpack(), weight)
        assert_same(Bitmap.pack(packed.unpack()), packed)
        words = -(-size[1] // 32)
        entries = int((weight != 0).sum())
        assert packed.bytes == 4 * size[0] * words + 4 * (size[0] + 1) + weight.element_size() * entries
    codes, scale = round_rows(sparse(*size, density, 4))
    blocks = Blocks.pack(codes, scale)
    assert torch.equal(blocks.unpack_codes(), codes)
    assert torch.equal(blocks.unpack(), codes * scale[:, None])
    assert_same(Blocks.pack(blocks.unpack_codes(), blocks.scale), blocks)
    slots = -(-size[0] // 4) * 4
    assert blocks.bytes == 24 * len(blocks.places) + 4 * (slots // 4 + 1 + slots) + 8 * size[0]
    assert sorted(blocks.order.tolist()) == list(range(slots))


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 2), (4, 8), (2, 16)])
def test_so_many_of_so_many_come_back(keep: int, of: int) -> None:
    for rows, runs in ((1, 1), (3, 5), (9, 40)):
        weight = draw(rows, rows, runs, of)
        weight = weight.scatter(2, draw(rows + 1, rows, runs, of).argsort(2)[..., keep:], 0.0)
        weight[0, 0] = 0.0
        weight = weight.flatten(1)
        packed = NOfM.pack(weight, keep, of)
        assert packed.values.shape == (rows, runs * keep)
        assert torch.equal(packed.unpack(), weight)
        assert_same(NOfM.pack(packed.unpack(), keep, of), packed)
        crowded = weight.clone()
        crowded[-1, -of:] = 1.0
        with pytest.raises(LayoutError, match=f"row {rows - 1} has more than {keep} of {of}"):
            NOfM.pack(crowded, keep, of)


def test_two_of_four_lie_as_told() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 0.0, 9.0]])
    packed = NOfM.pack(weight, 2, 4)
    assert packed.values.tolist() == [[5.0, 7.0, 0.0, 9.0]]
    assert packed.positions.tolist() == [[0b11_00_11_01]]
    bitmap = Bitmap.pack(weight)
    assert bitmap.bits.tolist() == [[0b10001010]]
    assert bitmap.starts.tolist() == [0, 3]
    blocks = Blocks.pack(torch.tensor([[0, 0, 0, 0, 1, -2, 0]], dtype=torch.int8), torch.ones(1))
    assert blocks.places.tolist() == [[1, 0, 0, 0]]
    assert blocks.codes.tolist() == [[[1, -2, 0, 0], [0] * 4, [0] * 4, [0] * 4]]


def test_blocks_of_many_rows_hardly_fill_up() -> None:
    codes, scale = round_rows(sparse(512, 768, 0.1, 4))
    blocks = Blocks.pack(codes, scale)
    assert 4 * len(blocks.places) < 1.1 * int((codes.unflatten(1, (-1, 4)) != 0).any(2).sum())


def test_zeros_have_no_sign() -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, 0.0], [2.0, -0.0, 0.0, 3.0]])
    for packed in (Bitmap.pack(weight), NOfM.pack(weight, 2, 4)):
        unpacked = packed.unpack()
        assert torch.equal(unpacked, weight)
        assert not torch.signbit(unpacked).any()


def test_rounding_is_to_the_nearest_code() -> None:
    weight = sparse(20, 60, 0.5)
    codes, scale = round_rows(weight)
    assert codes.abs().amax(1).tolist() == [127 if row.any() else 0 for row in weight]
    assert ((codes * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    with pytest.raises(LayoutError, match="expected at most 65536"):
        Blocks.pack(torch.zeros(1, 65537, dtype=torch.int8), torch.ones(1))


@pytest.mark.parametrize("kind", ["bitmap", "blocks", "n_of_m"])
def test_indices_that_point_outside_are_told(kind: str) -> None:
    weight = sparse(9, 40, 0.3, 4)
    packed = {
        "bitmap": lambda: Bitmap.pack(weight),
        "blocks": lambda: Blocks.pack(*round_rows(weight)),
        "n_of_m": lambda: NOfM.pack(weight * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(10), 2, 4),
    }[kind]()
    assert packed.problem() == ""
    for name, held in packed.tensors().items():
        if held.dtype not in (torch.int32, torch.int16) or name == "sums":
            continue
        broken = held.clone()
        broken.view(-1)[-1] = 12345
        assert replace(packed, **{name: broken}).problem(), name


# Kernels.


def test_the_kernels_are_compiled_here() -> None:
    assert kernels() is not None
    assert PATHS[0] == "plain"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("size", [*SIZES, (130, 300), (64, 768), (7, 1000)])
def test_a_product_is_that_of_the_unpacked_matrix(size: tuple[int, int], density: float, path: str) -> None:
    outputs, inputs = size
    weight = sparse(outputs, inputs, density)
    codes, scale = round_rows(sparse(outputs, inputs, density, 4))
    blocks = Blocks.pack(codes, scale)
    for number, rows in enumerate((1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 300)):
        x = 3 * draw(number, rows, inputs) + 1
        x[rows // 2] = 0
        bias = draw(number + 1, outputs) if number % 2 else None
        exact = torch.zeros(outputs) if bias is None else bias
        for values in (torch.float32, torch.bfloat16):
            packed = Bitmap.pack(weight.to(values))
            unpacked = packed.unpack().double()
            met = bitmap_product(x, packed, bias, path)
            error = (met - (x.double() @ unpacked.T + exact)).abs()
            assert (error <= 2**-18 * (x.double().abs() @ unpacked.abs().T + exact.abs()) + 1e-12).all()
        met = blocks_product(x, blocks, bias, path)
        assert torch.equal(met, blocks_reference(x, blocks, bias))
        steps = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255
        worst = steps[:, None].double() * blocks.unpack().double().abs().sum(1)
        error = (met - (x.double() @ blocks.unpack().double().T + exact)).abs()
        assert (error <= 0.51 * worst + 1e-4 * (1 + exact.abs())).all()


@pytest.mark.parametrize("path", PATHS)
def test_extremes(path: str) -> None:
    inputs = 65536
    codes = torch.full((2, inputs), 127, dtype=torch.int8)
    codes[1] = -127
    blocks = Blocks.pack(codes, torch.tensor([1.0, 2.0]))
    x = torch.full((5, inputs), 3.0e38)
    x[1], x[2, ::2], x[3], x[4] = -3.0e38, -3.0e38, 1e-40, 0.0
    met = blocks_product(x / inputs / 300, blocks, None, path)
    assert torch.equal(met, blocks_reference(x / inputs / 300, blocks))
    assert met.isfinite().all()
    assert float(met[0, 0]) == pytest.approx(1e38 * 1.27, rel=1e-5)
    assert (met[4] == 0).all()
    wide = draw(1, 3, inputs) * 1e30
    wide[0, 7] = 3.4e38
    wide[1, 7] = -3.4e38
    assert torch.equal(blocks_product(wide, blocks, None, path), blocks_reference(wide, blocks))


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path: str) -> None:
    weight = sparse(20, 50, 0.3)
    x = draw(2, 12, 50)
    whole = x.clone()
    x[3, 4], x[9, 49], x[11, 0] = float("nan"), float("inf"), -float("inf")
    others = [row for row in range(12) if row not in (3, 9, 11)]
    blocks = Blocks.pack(*round_rows(weight))
    met = blocks_product(x, blocks, None, path)
    assert met[[3, 9, 11]].isnan().all()
    assert torch.equal(met[others], blocks_product(whole, blocks, None, path)[others])
    assert torch.equal(met.isnan(), blocks_reference(x, blocks).isnan())
    bitmap = Bitmap.pack(weight)
    met = bitmap_product(x, bitmap, None, path)
    assert torch.equal(met[others], bitmap_product(whole, bitmap, None, path)[others])
    assert met[3][weight[:, 4] != 0].isnan().all()  # outputs with no weight there may not see it


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_threads_change_nothing(rows: int, path: str) -> None:
    weight, x = sparse(300, 200, 0.3), draw(3, rows, 200)
    blocks, bitmap = Blocks.pack(*round_rows(weight)), Bitmap.pack(weight)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((blocks_product(x, blocks, None, path), bitmap_product(x, bitmap, None, path)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *given, **more: plain(*given, **more).fill_(float("nan")))
    for outputs in (1, 3, 63, 65, 200):
        weight = sparse(outputs, 70, 0.2)
        for rows in (1, 4, 6, 16, 20, 33):
            for path in PATHS:
                x = draw(rows, rows, 70)
                assert blocks_product(x, Blocks.pack(*round_rows(weight)), None, path).isfinite().all()
                assert bitmap_product(x, Bitmap.pack(weight), None, path).isfinite().all()


def test_no_rows_and_more_dimensions() -> None:
    weight = sparse(10, 30, 0.3)
    for packed in (Bitmap.pack(weight), Blocks.pack(*round_rows(weight))):
        layer = SparseLinear(packed, draw(1, 10))
        assert layer(torch.zeros(0, 30)).shape == (0, 10)
        x = draw(2, 2, 3, 30)
        assert torch.equal(layer(x), layer(x.view(6, 30)).view(2, 3, 10))
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        turned = x.transpose(0, 1)
        assert torch.equal(layer(turned), layer(turned.contiguous()))


# Operators.


@pytest.mark.parametrize("kind", ["bitmap", "bitmap16", "blocks"])
def test_operators_are_whole(kind: str) -> None:
    weight = sparse(10, 36, 0.4)
    packed = Blocks.pack(*round_rows(weight)) if kind == "blocks" else Bitmap.pack(weight)
    layer = SparseLinear(Bitmap.pack(weight.bfloat16()) if kind == "bitmap16" else packed, draw(1, 10))
    product = getattr(torch.ops.hf_compress, f"{layer.format}_linear").default
    for x in (draw(2, 5, 36), draw(2, 2, 3, 36)):
        for bias in (layer.bias.detach(), None):
            held = [one.detach() for one in layer.tensors()]
            torch.library.opcheck(product, (x, *held, bias))
    x = draw(2, 5, 36)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
    assert torch.equal(program.module()(draw(3, 7, 36)), layer(draw(3, 7, 36)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("kind", ["bitmap", "blocks"])
def test_without_a_compiler_the_reference_runs_and_says_so_once(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    weight, x = sparse(10, 36, 0.4), draw(2, 5, 36)
    layer = SparseLinear(Blocks.pack(*round_rows(weight)) if kind == "blocks" else Bitmap.pack(weight), draw(1, 10))
    with torch.no_grad():
        expected = layer(x)
        told: list[str] = []
        monkeypatch.setattr(library, "say", told.append)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        kernels.cache_clear()
        try:
            met = [layer(x) for _ in range(2)]
        finally:
            kernels.cache_clear()
    torch.testing.assert_close(met[0], expected)
    assert len(told) == 1
    assert "no C++ compiler found" in told[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["bitmap", "bitmap16", "blocks"])
def test_a_node_of_onnx_runtime_computes_what_the_operator_does(kind: str, threads: int, tmp_path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library.onnx_library()))
    for outputs, inputs in ((1, 1), (7, 50), (65, 128), (70, 300), (130, 129)):
        weight, bias = sparse(outputs, inputs, 0.3, 4 if kind == "blocks" else 1), draw(1, outputs)
        packed = Blocks.pack(*round_rows(weight)) if kind == "blocks" else Bitmap.pack(weight)
        layer = SparseLinear(Bitmap.pack(weight.bfloat16()) if kind == "bitmap16" else packed, bias).eval()
        with as_nodes(layer), torch.no_grad():
            rows = {"x": {0: torch.export.Dim("rows", min=1)}}
            program = torch.onnx.export(layer, (draw(2, 3, inputs),), dynamo=True, dynamic_shapes=rows, verbose=False)
        program.save(tmp_path / "node.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "node.onnx", options)
        for count in (1, 2, 3, 4, 5, 8, 17, 40):
            x = draw(count, count, inputs)
            met = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
            assert torch.equal(met, layer(x).detach())


def test_a_path_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.PATHS, "wider", 9)
    with pytest.raises(ValueError, match="this processor has no wider"):
        bitmap_product(draw(1, 2, 8), Bitmap.pack(draw(2, 3, 8)), None, "wider")


def test_a_library_is_compiled_once_and_by_its_sources(tmp_path) -> None:
    first = built(tmp_path, (*FLAGS, "-O0"))
    stamp = first.stat().st_mtime_ns
    assert built(tmp_path, (*FLAGS, "-O0")) == first
    assert first.stat().st_mtime_ns == stamp
    with pytest.raises(subprocess.CalledProcessError):
        built(tmp_path, ("--no-such-flag",))
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
