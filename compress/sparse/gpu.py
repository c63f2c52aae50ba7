"""Products with packed matrices on NVIDIA GPUs, as torch operators that graphs of CUDA and of torch.compile can hold.

Each multiplies numbers of the stored type, bfloat16 or float16: rows of another type are rounded to it first. Sums are
float32. Nothing waits for the GPU. Where the kernels can't be had, and on other devices, the reference does the same in
torch. None has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_long
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress import bits as counting
from compress.sparse.bsr import Bsr
from compress.sparse.device import Argument, Kernels, kernels_on
from compress.sparse.formats import WORD, Bitmap
from compress.sparse.ops import NAMESPACE, library
from compress.sparse.semi import SemiInt4

HALVES = (torch.bfloat16, torch.float16)
ALIGNED = 16  # bytes that are loaded at once

library.define("semi_int4_linear(Tensor x, Tensor codes, Tensor positions, Tensor scale, Tensor? bias) -> Tensor")
library.define(
    "bsr_linear(Tensor x, Tensor order, Tensor starts, Tensor places, Tensor tiles, int outputs, Tensor? bias) "
    "-> Tensor"
)
library.define("signs_linear(Tensor x, Tensor bits, Tensor scale, Tensor? bias) -> Tensor")
library.define("signs_product(Tensor a, Tensor b, int count) -> Tensor")
library.define("seen_product(Tensor seen, Tensor values) -> Tensor")


def bitmap_product(kernels: Kernels, x: Tensor, packed: Bitmap, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` of x (..., in), in the values' type: (..., out)."""
    count = packed.bits.shape[1]
    held = (packed.bits.contiguous(), packed.starts.contiguous(), _aligned(packed.values))
    rows, bias = _prepared(x, count * WORD, packed.values.dtype, bias)
    return _product(kernels, "bitmap", x, rows, packed.shape[0], (count, c_long(len(packed.values))), held, bias)


def semi_int4_product(kernels: Kernels, x: Tensor, packed: SemiInt4, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` of x (..., in), in the scale's type: (..., out)."""
    held = (_aligned(packed.codes), _aligned(packed.positions), packed.scale.contiguous())
    rows, bias = _prepared(x, packed.width, packed.scale.dtype, bias)
    return _product(kernels, "semi", x, rows, packed.shape[0], (packed.width, packed.group), held, bias)


def bsr_product(kernels: Kernels, x: Tensor, packed: Bsr, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` of x (..., in), in the tiles' type: (..., out)."""
    order = (packed.order.contiguous(), packed.starts.contiguous(), packed.places.contiguous())
    rows, bias = _prepared(x, packed.width, packed.tiles.dtype, bias)
    sizes, held = (packed.width, packed.side), (*order, _aligned(packed.tiles))
    return _product(kernels, "bsr", x, rows, packed.shape[0], sizes, held, bias)


def signs_linear_product(
    kernels: Kernels, x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``scale (x S^T) + bias`` of x (..., in) and bits (out, bytes) of signs, in x's type: (..., out)."""
    filled = _aligned(_filled(bits, ALIGNED))
    kind = x.dtype if x.dtype in HALVES else torch.bfloat16
    rows, bias = _prepared(x, filled.shape[1] * 8, kind, bias)
    held = (filled, scale.float().contiguous())
    return _product(kernels, "signs_linear", x, rows, len(bits), (filled.shape[1] // 4,), held, bias)


def counted_product(kernels: Kernels, a: Tensor, b: Tensor, count: int | None) -> Tensor:
    """``a b^T`` of bits (..., m, bytes) and (..., n, bytes), float32: signs, or if no count is given, `a` 1 or 0."""
    left, right = (_filled(one, 4).flatten(0, -3) if one.dim() > 2 else _filled(one, 4)[None] for one in (a, b))
    result = left.new_empty(*a.shape[:-1], b.shape[-2], dtype=torch.float32)
    if result.numel():
        sizes = (count is None, len(left), a.shape[-2], b.shape[-2], left.shape[-1] // 4, count or 0)
        kernels("counted", result, *map(int, sizes), left, right)
    return result


def _product(
    kernels: Kernels,
    name: str,
    x: Tensor,
    rows: Tensor,
    outputs: int,
    sizes: Sequence[Argument],
    held: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """What a kernel makes of the prepared rows of x (..., in) and a matrix that is `held`: (..., out)."""
    result = rows.new_empty(len(rows), outputs)
    if result.numel():
        kernels(name, result, int(rows.dtype == torch.float16), len(rows), outputs, *sizes, rows, *held, bias)
    return result.view(*x.shape[:-1], -1)


def _prepared(x: Tensor, width: int, kind: torch.dtype, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of x, filled up with zeros to a width, and the bias, as the kernels read them."""
    rows = x.detach().reshape(-1, x.shape[-1]).to(kind)
    rows = F.pad(rows, (0, width - rows.shape[1])) if rows.shape[1] < width else rows
    return _aligned(rows), None if bias is None else bias.detach().to(kind).contiguous()


def _aligned(held: Tensor) -> Tensor:
    held = held.detach().contiguous()
    return held if held.data_ptr() % ALIGNED == 0 else held.clone()


def _filled(bits: Tensor, each: int) -> Tensor:
    """Rows of bytes, filled up with zeros to multiples of so many."""
    lacking = -bits.shape[-1] % each
    return (F.pad(bits.detach(), (0, lacking)) if lacking else bits.detach()).contiguous()


def _bitmap_card(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    packed, kernels = Bitmap((len(bits), x.shape[-1]), bits, starts, values), kernels_on(x.device)
    if kernels is None or values.dtype not in HALVES:
        return F.linear(x.float(), packed.unpack().float(), None if bias is None else bias.float()).to(x.dtype)
    return bitmap_product(kernels, x, packed, bias).to(x.dtype)


def _semi(x: Tensor, codes: Tensor, positions: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    weight = SemiInt4((len(codes), x.shape[-1]), codes, positions, scale).unpack()
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _semi_card(x: Tensor, codes: Tensor, positions: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if (kernels := kernels_on(x.device)) is None:
        return _semi(x, codes, positions, scale, bias)
    packed = SemiInt4((len(codes), x.shape[-1]), codes, positions, scale)
    return semi_int4_product(kernels, x, packed, bias).to(x.dtype)


def _bsr(
    x: Tensor, order: Tensor, starts: Tensor, places: Tensor, tiles: Tensor, outputs: int, bias: Tensor | None
) -> Tensor:
    weight = Bsr((outputs, x.shape[-1]), order, starts, places, tiles).unpack()
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _bsr_card(
    x: Tensor, order: Tensor, starts: Tensor, places: Tensor, tiles: Tensor, outputs: int, bias: Tensor | None
) -> Tensor:
    kernels = kernels_on(x.device)
    if kernels is None or tiles.dtype not in HALVES:
        return _bsr(x, order, starts, places, tiles, outputs, bias)
    packed = Bsr((outputs, x.shape[-1]), order, starts, places, tiles)
    return bsr_product(kernels, x, packed, bias).to(x.dtype)


def _signs_linear(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    result = F.linear(x.float(), counting.unpack(bits, x.shape[-1])) * scale.float()
    return (result if bias is None else result + bias.float()).to(x.dtype)


def _signs_linear_card(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if (kernels := kernels_on(x.device)) is None:
        return _signs_linear(x, bits, scale, bias)
    return signs_linear_product(kernels, x, bits, scale, bias).to(x.dtype)


def _signs(a: Tensor, b: Tensor, count: int) -> Tensor:
    return counting.unpack(a, count) @ counting.unpack(b, count).mT


def _signs_card(a: Tensor, b: Tensor, count: int) -> Tensor:
    kernels = kernels_on(a.device)
    return _signs(a, b, count) if kernels is None else counted_product(kernels, a, b, count)


def _seen(seen: Tensor, values: Tensor) -> Tensor:
    count = seen.shape[-1] * 8
    return (counting.unpack(seen, count) + 1) / 2 @ counting.unpack(values, count).mT


def _seen_card(seen: Tensor, values: Tensor) -> Tensor:
    kernels = kernels_on(seen.device)
    return _seen(seen, values) if kernels is None else counted_product(kernels, seen, values, None)


CARD = {  # what computes each operator on a GPU
    "bitmap_linear": _bitmap_card,
    "semi_int4_linear": _semi_card,
    "bsr_linear": _bsr_card,
    "signs_linear": _signs_linear_card,
    "signs_product": _signs_card,
    "seen_product": _seen_card,
}
for _name, _card in CARD.items():
    library.impl(_name, _card, "CUDA")
library.impl("semi_int4_linear", _semi, "CompositeExplicitAutograd")
library.impl("bsr_linear", _bsr, "CompositeExplicitAutograd")
library.impl("signs_linear", _signs_linear, "CompositeExplicitAutograd")
library.impl("signs_product", _signs, "CompositeExplicitAutograd")
library.impl("seen_product", _seen, "CompositeExplicitAutograd")
library.impl("signs_product", counting.signs_product, "CPU")
library.impl("seen_product", counting.seen_product, "CPU")


@torch.library.register_fake(f"{NAMESPACE}::semi_int4_linear")
@torch.library.register_fake(f"{NAMESPACE}::signs_linear")
def _linear_shape(x: Tensor, held: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], held.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::bsr_linear")
def _bsr_shape(x: Tensor, *held: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], held[4])


@torch.library.register_fake(f"{NAMESPACE}::signs_product")
@torch.library.register_fake(f"{NAMESPACE}::seen_product")
def _product_shape(a: Tensor, b: Tensor, _: int = 0) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-2], dtype=torch.float32)
