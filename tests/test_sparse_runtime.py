"""The sparse runtime: what is packed comes back bit for bit, and every kernel computes what the dense matrix does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import LayoutError
from compress.sparse.formats import Bitmap, Blocks, Format, NOfM, round_rows

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
    assert blocks.bytes == 6 * len(blocks.places) + 4 * (size[0] + 1) + 4 * size[0]


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
    assert (blocks.places.tolist(), blocks.codes.tolist()) == ([1], [[1, -2, 0, 0]])


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
    with pytest.raises(LayoutError, match="expected at most 131072"):
        Blocks.pack(torch.zeros(1, 131073, dtype=torch.int8), torch.ones(1))
