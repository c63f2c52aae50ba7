"""Products with packed matrices as torch operators, so that graphs of torch.compile and torch.export can hold them.

On the CPU they run in our own kernels; elsewhere, and where those can't be compiled, the reference unpacks the matrix
and multiplies, by the same arithmetic. They have no gradients: what is packed isn't trained any more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.sparse.formats import Bitmap, Blocks
from compress.sparse.library import PATHS, kernels

NAMESPACE = "hf_compress"
LEAST_STEP = 1e-30  # so that one over it is finite

library = torch.library.Library(NAMESPACE, "DEF")
library.define(
    "blocks_linear(Tensor x, Tensor order, Tensor starts, Tensor places, Tensor codes, Tensor scale, Tensor sums, "
    "Tensor? bias) -> Tensor"
)
library.define("bitmap_linear(Tensor x, Tensor bits, Tensor starts, Tensor values, Tensor? bias) -> Tensor")


def blocks_product(x: Tensor, packed: Blocks, bias: Tensor | None = None, path: str = "best") -> Tensor:
    """``x W^T + bias`` of x (..., in), by the kernels of one set of instructions; float32, (..., out).

    Each row of x is rounded to 255 steps of its own between its least and its largest number, 0 among them; one that
    has a number that isn't finite gives NaN. Raises ValueError where the processor lacks the instructions.
    """
    rows, result = _prepared(x, packed.shape)
    held = (packed.order, packed.starts, packed.places, packed.codes, packed.scale.float(), packed.sums)
    _call("blocks", path, rows, packed.shape, held, (), bias, result)
    return result.view(*x.shape[:-1], packed.shape[0])


def bitmap_product(x: Tensor, packed: Bitmap, bias: Tensor | None = None, path: str = "best") -> Tensor:
    """``x W^T + bias`` of x (..., in), by the kernels of one set of instructions; float32, (..., out).

    Values are float32 or bfloat16, sums float32. Raises ValueError where the processor lacks the instructions.
    """
    rows, result = _prepared(x, packed.shape)
    halves = packed.values.dtype == torch.bfloat16
    values = packed.values if halves else packed.values.float()
    _call("bitmap", path, rows, packed.shape, (packed.bits, packed.starts, values), (halves,), bias, result)
    return result.view(*x.shape[:-1], packed.shape[0])


def blocks_reference(x: Tensor, packed: Blocks, bias: Tensor | None = None) -> Tensor:
    """What `blocks_product` computes, in torch."""
    rows = x.reshape(-1, packed.shape[1]).float()
    low, high = rows.clamp(max=0).amin(1, keepdim=True), rows.clamp(min=0).amax(1, keepdim=True)
    step = (high / 255 - low / 255).clamp(min=LEAST_STEP)
    inverse = 1 / step
    zero = (-low * inverse).round()
    codes = (rows * inverse).round().add(zero).clamp(0, 255) - zero
    whole = codes.double() @ packed.unpack_codes().double().T  # exact: sums of whole numbers below 2^53
    result = whole.float() * (step * packed.scale.float())
    result = result if bias is None else result + bias.float()
    finite = rows.isfinite().all(1, keepdim=True)
    return torch.where(finite, result, torch.nan).view(*x.shape[:-1], packed.shape[0])


def _prepared(x: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows of x as the kernels read them, and room for their result."""
    rows = x.detach().reshape(-1, shape[1]).float().contiguous()
    return rows, rows.new_empty(len(rows), shape[0])


def _call(
    name: str,
    path: str,
    rows: Tensor,
    shape: tuple[int, int],
    held: tuple[Tensor, ...],
    more: tuple[int, ...],
    bias: Tensor | None,
    result: Tensor,
) -> None:
    """Call a kernel; `held` are the tensors of the format, in their order."""
    found = kernels()
    if found is None:
        raise ValueError("the sparse kernels are not compiled here")
    bias = None if bias is None else bias.detach().float().contiguous()
    held = tuple(one.contiguous() for one in held)
    pointers = [rows.data_ptr(), *[one.data_ptr() for one in held], *more, None if bias is None else bias.data_ptr()]
    sizes = (PATHS[path], torch.get_num_threads(), len(rows), shape[1], shape[0])
    if getattr(found, f"hf_compress_{name}")(*sizes, *pointers, result.data_ptr()):
        raise ValueError(f"this processor has no {path}")


def _blocks(x: Tensor, *held: Tensor) -> tuple[Blocks, Tensor | None]:
    *tensors, bias = held
    return Blocks((tensors[4].shape[0], x.shape[-1]), *tensors), bias


def _bitmap(x: Tensor, *held: Tensor) -> tuple[Bitmap, Tensor | None]:
    *tensors, bias = held
    return Bitmap((tensors[0].shape[0], x.shape[-1]), *tensors), bias


def _blocks_anywhere(x: Tensor, *held: Tensor) -> Tensor:
    return blocks_reference(x, *_blocks(x, *held)).to(x.dtype)


def _bitmap_anywhere(x: Tensor, *held: Tensor) -> Tensor:
    packed, bias = _bitmap(x, *held)
    result = F.linear(x.float(), packed.unpack().float(), None if bias is None else bias.float())
    return result.to(x.dtype)


def _blocks_here(x: Tensor, *held: Tensor) -> Tensor:
    return _blocks_anywhere(x, *held) if kernels() is None else blocks_product(x, *_blocks(x, *held)).to(x.dtype)


def _bitmap_here(x: Tensor, *held: Tensor) -> Tensor:
    return _bitmap_anywhere(x, *held) if kernels() is None else bitmap_product(x, *_bitmap(x, *held)).to(x.dtype)


library.impl("blocks_linear", _blocks_anywhere, "CompositeExplicitAutograd")
library.impl("bitmap_linear", _bitmap_anywhere, "CompositeExplicitAutograd")
library.impl("blocks_linear", _blocks_here, "CPU")
library.impl("bitmap_linear", _bitmap_here, "CPU")


@torch.library.register_fake(f"{NAMESPACE}::blocks_linear")
def _blocks_shape(x: Tensor, *held: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], held[4].shape[0])


@torch.library.register_fake(f"{NAMESPACE}::bitmap_linear")
def _bitmap_shape(x: Tensor, *held: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], held[0].shape[0])
