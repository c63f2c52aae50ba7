"""Square tiles: what is packed is what was there, and the kernel multiplies by that, at every side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import LayoutError
from compress.sparse import gpu
from compress.sparse.bsr import SIDES, Bsr, in_tiles
from compress.sparse.modules import SparseLinear
from tests.test_gpu_kernels import HALVES, POISON, Watched, assert_near, draw, given, needs_gpu

ROWS = (1, 2, 7, 16, 33, 128)
SIZES = ((1, 1), (16, 32), (17, 100), (70, 257), (130, 700))


def tiled(outputs: int, inputs: int, side: int, density: float, kind: torch.dtype = torch.float32) -> Tensor:
    """A matrix whose tiles are zero or not, the first row of them all zero and the last full, zeros of both signs."""
    seed = 1000 * outputs + inputs
    rows, columns = -(-outputs // side), -(-inputs // side)
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    if rows > 1:
        kept[0], kept[-1] = False, True
    whole = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)[:outputs, :inputs]
    weight = draw(seed, outputs, inputs) * whole  # negative numbers leave -0.0
    weight[-1, ::3] = -0.0
    return weight.to(kind)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_what_is_packed_is_what_was_there(outputs: int, inputs: int, side: int) -> None:
    weight = tiled(outputs, inputs, side, 0.4)
    packed = Bsr.pack(weight, side)
    assert torch.equal(packed.unpack(), weight)
    assert not (packed.unpack().signbit() & (weight == 0)).any()
    assert packed.problem() == ""
    again = Bsr.pack(packed.unpack(), side)
    assert all(torch.equal(one, again.tensors()[name]) for name, one in packed.tensors().items())
    lengths = packed.starts.diff()[packed.order.long()]
    assert (lengths.diff() <= 0).all()
    hollow = Bsr.hollow(packed.shape, len(packed.tiles), torch.float32, side)
    assert all(one.shape == packed.tensors()[name].shape for name, one in hollow.tensors().items())


@pytest.mark.parametrize("side", SIDES)
def test_the_side_is_that_of_the_zeros(side: int) -> None:
    weight = tiled(256, 512, side, 0.4)
    assert Bsr.pack(weight).side == side
    assert in_tiles(weight)
    assert not in_tiles(draw(1, 64, 64) * (draw(2, 64, 64) > 0))
    assert not in_tiles(torch.ones(64, 64))


def test_what_can_not_be_packed_or_points_outside_is_told() -> None:
    with pytest.raises(LayoutError, match="tiles of 8; expected one of 64, 32, 16"):
        Bsr.pack(torch.ones(8, 8), 8)
    for name, said in (("order", "twice"), ("starts", "begin within"), ("places", "past its 700 inputs")):
        packed = Bsr.pack(tiled(130, 700, 16, 0.4))
        packed.tensors()[name][-1] = 44
        assert said in packed.problem()


@pytest.mark.parametrize("kind", HALVES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_the_kernel_is_the_dense_product(lanes, outputs: int, inputs: int, side: int, kind: torch.dtype) -> None:
    weight = tiled(outputs, inputs, side, 0.4, kind)
    packed = Bsr.pack(weight, side)
    for rows in (7, 128) if inputs > 256 else ROWS:
        x = given(rows, inputs, kind)[0]
        bias = draw(7, outputs).to(kind) if rows % 2 else None
        met = gpu.bsr_product(Watched(lanes), x, packed, bias)
        assert met.dtype == kind
        assert_near(met, x, weight, bias)


@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_the_kernel_gives_nothing_of_zeros_and_keeps_the_largest(lanes, kind: torch.dtype) -> None:
    empty = torch.zeros(20, 40, dtype=kind)
    x, bias = draw(1, 3, 40).to(kind), draw(2, 20).to(kind)
    assert torch.equal(gpu.bsr_product(Watched(lanes), x, Bsr.pack(empty), bias), bias.expand(3, 20))
    largest = torch.finfo(kind).max
    weight = tiled(40, 64, 16, 0.5, kind).sign() * largest
    x = torch.full((3, 64), 2.0**-8, dtype=kind)
    x[2, 5] = torch.nan
    met = gpu.bsr_product(Watched(lanes), x, Bsr.pack(weight))[:, weight[:, 5] != 0]
    weight = weight[weight[:, 5] != 0].double()
    exact, most = x[:2].double() @ weight.T, x[:2].double() @ weight.abs().T
    fits = exact.abs() <= largest
    assert fits.any()
    assert ((met[:2].double() - exact).abs() <= 2**-9 * most)[fits].all()
    assert met[2].isnan().all()


def test_a_layer_off_the_tile_is_told_how_many_outputs_it_has(card) -> None:
    weight = tiled(70, 100, 16, 0.4, torch.bfloat16)
    layer, x = SparseLinear(Bsr.pack(weight), draw(3, 70).to(torch.bfloat16)), draw(4, 2, 5, 100).to(torch.bfloat16)
    reference = layer(x)
    with card:
        met = layer(x)
    assert card.asked == ["bsr_linear"]
    assert met.shape == (2, 5, 70)
    torch.testing.assert_close(met, reference, rtol=2**-7, atol=2**-7)
    held = Bsr.pack(weight).tensors().values()
    torch.library.opcheck(torch.ops.hf_compress.bsr_linear, (x, *held, 70, None))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", HALVES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("outputs", "inputs"), [*SIZES, (1000, 4100)])
def test_on_a_gpu_the_kernel_agrees_with_float32(outputs: int, inputs: int, side: int, rows: int, kind) -> None:
    weight, x = tiled(outputs, inputs, side, 0.4, kind), given(rows, inputs, kind)[0]
    held = [one.cuda() for one in Bsr.pack(weight, side).tensors().values()]
    torch.empty(rows, outputs, dtype=kind, device="cuda").fill_(POISON)  # likely where the result will lie
    assert_near(torch.ops.hf_compress.bsr_linear(x.cuda(), *held, outputs, None).cpu(), x, weight)
