"""Formats of matrices (out, in) that are mostly zeros: what is stored of them, in pure torch, as the reference.

All three keep a row's entries together in the order of its inputs, and tell where they lie in little:

``Bitmap``      one bit a weight, in words of 32 inputs, the first input the lowest bit; the weights that aren't zero,
                packed; and where each row's begin. Where those of a word begin is the count of the bits before it in
                its row. 1 + 16 density bits a weight for sixteen-bit values: smaller than dense below 15/16.
``Blocks``      runs of four inputs, each four int8 codes with one index, which is one lane of the dot products that
                processors have for int8; a row has one scale. 12 density bits a weight.
``NOfM``        so many of each few inputs: their values and their positions, two bits each (four where a run is longer
                than four), in words. What graphics cards skip in hardware.

Packing is exact: unpacking gives the same numbers back, but for -0.0, which becomes 0.0 as every zero that isn't
stored. Packing what was unpacked gives the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import LayoutError

WORD = 32  # bits
BLOCK = 4  # inputs that share an index
LARGEST = 127  # of the codes
MOST_INPUTS = BLOCK << 15  # that a block's index reaches


@dataclass(frozen=True)
class Format:
    """A packed matrix of `shape` (out, in); all other fields are tensors or small numbers."""

    shape: tuple[int, int]

    name: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {field.name: held for field in fields(self) if isinstance(held := getattr(self, field.name), Tensor)}

    @property
    def bytes(self) -> int:
        """What it takes, in memory as on disk."""
        return sum(held.numel() * held.element_size() for held in self.tensors().values())

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bitmap(Format):
    """`bits` (out, words) int32, `starts` (out + 1,) int32 into `values` (entries,), of the weights' own type."""

    bits: Tensor
    starts: Tensor
    values: Tensor

    name: ClassVar[str] = "bitmap"

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Store a matrix (out, in)."""
        kept = weight != 0
        return cls(_shape(weight), words(kept, 1), _starts(kept.sum(1)), weight[kept])

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all."""
        kept = codes(self.bits, 1)[:, : self.shape[1]].bool()
        return self.values.new_zeros(self.shape).masked_scatter_(kept, self.values)


@dataclass(frozen=True)
class Blocks(Format):
    """`starts` (out + 1,) int32 into `places` (entries,) int16 and `codes` (entries, 4) int8; `scale` (out,) float32.

    A row's entry tells of the inputs ``4 * place`` to ``4 * place + 3``; those past the last input have the code 0.
    """

    starts: Tensor
    places: Tensor
    codes: Tensor
    scale: Tensor

    name: ClassVar[str] = "blocks"

    @classmethod
    def pack(cls, codes: Tensor, scale: Tensor) -> Self:
        """Store codes (out, in) int8 of which row i means ``scale[i] * codes[i]``."""
        if codes.shape[1] > MOST_INPUTS:
            raise LayoutError(f"a matrix of {codes.shape[1]} inputs; expected at most {MOST_INPUTS} to store in blocks")
        runs = F.pad(codes, (0, -codes.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        kept = (runs != 0).any(2)
        places = kept.nonzero()[:, 1].to(torch.int16)
        return cls(_shape(codes), _starts(kept.sum(1)), places, runs[kept], scale)

    def unpack_codes(self) -> Tensor:
        """The codes (out, in) int8, zeros and all."""
        rows, inputs = self.shape
        runs = self.codes.new_zeros(rows, -(-inputs // BLOCK), BLOCK)
        row = torch.arange(rows, device=runs.device).repeat_interleave(self.starts.diff())
        runs[row, self.places.long()] = self.codes
        return runs.flatten(1)[:, :inputs].contiguous()

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all."""
        return self.unpack_codes() * self.scale[:, None]


@dataclass(frozen=True)
class NOfM(Format):
    """`values` (out, runs * keep), and `positions` (out, words) int32: where in its run of `of` inputs each one lies.

    Positions of a run ascend; where fewer than `keep` aren't zero, positions of zeros fill it up.
    """

    keep: int
    of: int
    values: Tensor
    positions: Tensor

    name: ClassVar[str] = "n_of_m"

    @classmethod
    def pack(cls, weight: Tensor, keep: int, of: int) -> Self:
        """Store a matrix (out, in); raises LayoutError where a run has more than `keep` that aren't zero."""
        if not 0 < keep < of <= 16:
            raise LayoutError(f"{keep} of {of}; expected fewer than of, and of at most 16")
        if weight.shape[1] % of:
            raise LayoutError(f"a matrix of {weight.shape[1]} inputs; expected a multiple of {of}")
        runs = weight.unflatten(1, (-1, of))
        taken = runs != 0
        if (crowded := (taken.sum(2) > keep).any(1)).any():
            row = int(crowded.nonzero()[0])
            raise LayoutError(f"row {row} has more than {keep} of {of} weights that aren't zero; expected no more")
        places = (~taken).to(torch.uint8).argsort(dim=2, stable=True)[..., :keep].sort(2).values
        values = (runs.gather(2, places) + 0.0).flatten(1)  # -0.0 + 0.0 is 0.0
        return cls(_shape(weight), keep, of, values, words(places.flatten(1), position_bits(of)))

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all."""
        rows, inputs = self.shape
        places = codes(self.positions, position_bits(self.of))[:, : self.values.shape[1]]
        runs = self.values.new_zeros(rows, inputs // self.of, self.of)
        values = self.values.unflatten(1, (-1, self.keep))
        return runs.scatter_(2, places.long().unflatten(1, (-1, self.keep)), values).flatten(1)


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes (out, in) int8 of a matrix, and the scale of each row, by which its largest is 127 or -127."""
    scale = weight.abs().amax(1).float() / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def position_bits(of: int) -> int:
    """Bits of a position in a run of so many inputs."""
    return 2 if of <= 4 else 4


def words(codes: Tensor, bits: int) -> Tensor:
    """Small numbers (rows, count) of so many bits each, packed into words (rows, words) int32, the first the lowest."""
    each = WORD // bits
    filled = F.pad(codes.to(torch.int64), (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    shifts = torch.arange(0, WORD, bits, device=codes.device)
    whole = (filled << shifts).sum(2)
    return torch.where(whole < 1 << (WORD - 1), whole, whole - (1 << WORD)).to(torch.int32)


def codes(words: Tensor, bits: int) -> Tensor:
    """What words (rows, words) hold: (rows, count) int32, those that fill up the last word among them."""
    shifts = torch.arange(0, WORD, bits, device=words.device, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _starts(counts: Tensor) -> Tensor:
    """Where each row's entries begin, and where the last one's end."""
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
