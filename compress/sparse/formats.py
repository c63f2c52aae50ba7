"""Formats of matrices (out, in) that are mostly zeros: what is stored of them, in pure torch, as the reference.

All three keep a row's entries in the order of its inputs, and tell in little where they lie:

``Bitmap``      one bit a weight, in words of 32 inputs, the first input the lowest bit; the weights that aren't zero,
                packed; and where each row's begin. Where those of a word begin is the count of the bits before it in
                its row. 1 + 16 density bits a weight for sixteen-bit values: smaller than dense below 15/16.
``Blocks``      runs of four inputs, each four int8 codes with one index, which is one lane of the dot products that
                processors have for int8; a row has one scale. 12 density bits a weight, and a little to fill up rows.
``NOfM``        so many of each few inputs: their values and their positions, two bits each (four where a run is longer
                than four), in words. What graphics cards skip in hardware.

Packing is exact: unpacking gives the same numbers back, but for -0.0, which becomes 0.0 as every zero that isn't
stored. Packing what was unpacked gives the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import LayoutError

WORD = 32  # bits
BLOCK = 4  # inputs that share an index
LARGEST = 127  # of the codes
MOST_INPUTS = 1 << 16  # with more, a sum of bytes times codes could leave 32 bits
CHUNK = 64  # rows that lie together
SIDE = 4  # rows whose blocks lie side by side


@dataclass(frozen=True)
class Format:
    """A packed matrix of `shape` (out, in); all other fields are tensors or small numbers."""

    shape: tuple[int, int]

    name: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def names(cls) -> list[str]:
        """Names of the tensors that are stored."""
        return [field.name for field in fields(cls) if field.type == "Tensor"]

    @property
    def bytes(self) -> int:
        """What it takes, in memory as on disk."""
        return sum(held.numel() * held.element_size() for held in self.tensors().values())

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all."""
        raise NotImplementedError

    def problem(self) -> str:
        """Which index points outside of the matrix or its entries; empty where none does."""
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
        return cls(_shape(weight), words(kept, 1), starts_of(kept.sum(1)), weight[kept])

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all."""
        kept = codes(self.bits, 1)[:, : self.shape[1]].bool()
        return self.values.new_zeros(self.shape).masked_scatter_(kept, self.values)

    @classmethod
    def hollow(cls, shape: tuple[int, int], entries: int, values: torch.dtype) -> Self:
        """Room for a matrix of so many entries."""
        bits = torch.empty(shape[0], -(-shape[1] // WORD), dtype=torch.int32)
        return cls(shape, bits, torch.empty(shape[0] + 1, dtype=torch.int32), torch.empty(entries, dtype=values))

    def record(self) -> dict[str, Any]:
        """What `hollow` must be told, as JSON."""
        kind = str(self.values.dtype).removeprefix("torch.")
        return _record(self, len(self.values), kind)

    def problem(self) -> str:
        """Which index points outside of the matrix or its entries; empty where none does."""
        kept = codes(self.bits, 1)
        if kept[:, self.shape[1] :].any():
            return f"bits are set past its {self.shape[1]} inputs"
        agree = torch.equal(starts_of(kept.sum(1)), self.starts) and int(self.starts[-1]) == len(self.values)
        return "" if agree else "its rows don't begin where its bits say"


@dataclass(frozen=True)
class Blocks(Format):
    """Codes int8 in blocks of four inputs, a scale for each row, four rows side by side.

    `order` (slots,) int32 is the row in each slot: the rows of each chunk of 64 in turn, those with most blocks first,
    so that four neighbours are as long; slots past the last row fill up the last four. `starts` (slots / 4 + 1,) int32
    tells where the entries of each four begin in `places` (entries, 4) int16 and `codes` (entries, 4, 4) int8. An entry
    holds a block of each: of the inputs ``4 * place`` to ``4 * place + 3``, those past the last with the code 0; where
    a row has fewer blocks than its neighbours, it is filled up with blocks of zeros at place 0. `scale` (out,) float32
    and `sums` (out,) int32 of the codes are in the order of the matrix.
    """

    order: Tensor
    starts: Tensor
    places: Tensor
    codes: Tensor
    scale: Tensor
    sums: Tensor

    name: ClassVar[str] = "blocks"

    @classmethod
    def pack(cls, codes: Tensor, scale: Tensor) -> Self:
        """Store codes (out, in) int8 of which row i means ``scale[i] * codes[i]``."""
        rows, inputs = codes.shape
        if inputs > MOST_INPUTS:
            raise LayoutError(f"a matrix of {inputs} inputs; expected at most {MOST_INPUTS} to store in blocks")
        runs = F.pad(codes, (0, -inputs % BLOCK, 0, -rows % SIDE)).unflatten(1, (-1, BLOCK))
        kept = (runs != 0).any(2)
        counts = kept.sum(1)
        order = [part.argsort(descending=True, stable=True) + CHUNK * i for i, part in enumerate(counts.split(CHUNK))]
        slots = torch.cat(order)
        lengths = counts[slots].view(-1, SIDE).amax(1)
        starts = starts_of(lengths)
        found = kept[slots].nonzero()  # (blocks, 2): slot and place
        first = counts[slots].cumsum(0) - counts[slots]
        slot = found[:, 0]
        entry = starts[slot // SIDE] + torch.arange(len(found), device=slot.device) - first[slot]
        places = found.new_zeros(int(lengths.sum()), SIDE, dtype=torch.int16)
        packed = codes.new_zeros(*places.shape, BLOCK)
        places[entry, slot % SIDE] = found[:, 1].to(torch.int16)
        packed[entry, slot % SIDE] = runs[slots][kept[slots]]
        sums = codes.sum(1, dtype=torch.int32)
        return cls((rows, inputs), slots.to(torch.int32), starts, places, packed, scale, sums)

    def unpack_codes(self) -> Tensor:
        """The codes (out, in) int8, zeros and all."""
        rows, inputs = self.shape
        runs = self.codes.new_zeros(len(self.order), -(-inputs // BLOCK), BLOCK)
        group = torch.arange(len(self.starts) - 1, device=runs.device).repeat_interleave(self.starts.diff())
        row = self.order.long().view(-1, SIDE)[group]
        runs.index_put_((row, self.places.long()), self.codes, accumulate=True)
        return runs.flatten(1)[:rows, :inputs].contiguous()

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all."""
        return self.unpack_codes() * self.scale[:, None]

    @classmethod
    def hollow(cls, shape: tuple[int, int], entries: int, values: torch.dtype) -> Self:
        """Room for a matrix of so many entries."""
        slots = -(-shape[0] // SIDE) * SIDE
        order, starts = torch.empty(slots, dtype=torch.int32), torch.empty(slots // SIDE + 1, dtype=torch.int32)
        places, packed = torch.empty(entries, SIDE, dtype=torch.int16), torch.empty(entries, SIDE, BLOCK, dtype=values)
        return cls(
            shape, order, starts, places, packed, torch.empty(shape[0]), torch.empty(shape[0], dtype=torch.int32)
        )

    def record(self) -> dict[str, Any]:
        """What `hollow` must be told, as JSON."""
        return _record(self, len(self.places), "int8")

    def problem(self) -> str:
        """Which index points outside of the matrix or its entries; empty where none does."""
        slots = torch.arange(len(self.order), device=self.order.device)
        in_order = torch.cat([part.sort().values for part in self.order.split(CHUNK)])
        if not torch.equal(in_order.long(), slots):
            return "its order has a row twice, or far from its place"
        if self.starts[0] != 0 or (self.starts.diff() < 0).any() or int(self.starts[-1]) != len(self.places):
            return f"its rows don't begin within its {len(self.places)} entries"
        within = (self.places >= 0) & (self.places < -(-self.shape[1] // BLOCK))
        return "" if within.all() else f"a block lies past its {self.shape[1]} inputs"


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

    def problem(self) -> str:
        """Which index points outside of the matrix or its entries; empty where none does."""
        places = codes(self.positions, position_bits(self.of))[:, : self.values.shape[1]]
        ascending = (places.unflatten(1, (-1, self.keep)).diff(dim=2) > 0).all()
        return "" if ascending and (places < self.of).all() else f"positions don't ascend within runs of {self.of}"


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


def _record(packed: Format, entries: int, values: str) -> dict[str, Any]:
    rows, inputs = packed.shape
    return {"format": packed.name, "outputs": rows, "inputs": inputs, "entries": entries, "values": values}


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def starts_of(counts: Tensor) -> Tensor:
    """Where each row's entries begin, and where the last one's end."""
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
