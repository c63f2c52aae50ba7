"""Square tiles of a matrix that aren't all zero, whole: for tensor cores, and so for many rows at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import LayoutError
from compress.sparse.formats import Format, starts_of

SIDES = (64, 32, 16)  # of a tile; what a product of tensor cores takes is the least


@dataclass(frozen=True)
class Bsr(Format):
    """Tiles (tiles, side, side) of a matrix cut into squares, those at its edges filled up with zeros.

    `places` (tiles,) int32 is which column of tiles each lies in, rising within a row of tiles; `starts` (rows of tiles
    + 1,) int32 where each row's begin; `order` (rows of tiles,) int32 those with most tiles first, as a GPU starts them
    so that none that takes long comes last.
    """

    order: Tensor
    starts: Tensor
    places: Tensor
    tiles: Tensor

    name: ClassVar[str] = "bsr"

    @classmethod
    def pack(cls, weight: Tensor, side: int | None = None) -> Self:
        """Store a matrix (out, in) in tiles of `side`, or of that side that stores least, of equal ones the largest."""
        if side is None:
            return min((cls.pack(weight, one) for one in SIDES), key=lambda packed: packed.tiles.numel())
        if side not in SIDES:
            raise LayoutError(f"tiles of {side}; expected one of {', '.join(map(str, SIDES))}")
        grid = _cut(weight, side)
        kept = (grid != 0).flatten(2).any(2)
        counts = kept.sum(1)
        order = counts.argsort(descending=True, stable=True).to(torch.int32)
        tiles = grid[kept] + 0.0  # -0.0 + 0.0 is 0.0
        shape = (weight.shape[0], weight.shape[1])
        return cls(shape, order, starts_of(counts), kept.nonzero()[:, 1].to(torch.int32), tiles)

    @property
    def side(self) -> int:
        """Rows and columns of a tile."""
        return self.tiles.shape[-1]

    @property
    def width(self) -> int:
        """Inputs with those that fill up the last column of tiles."""
        return -(-self.shape[1] // self.side) * self.side

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all."""
        rows, columns = len(self.order), self.width // self.side
        grid = self.tiles.new_zeros(rows, columns, self.side, self.side)
        row = torch.arange(rows, device=grid.device).repeat_interleave(self.starts.diff())
        grid[row, self.places.long()] = self.tiles
        return grid.transpose(1, 2).flatten(2).flatten(0, 1)[: self.shape[0], : self.shape[1]].contiguous()

    @classmethod
    def hollow(cls, shape: tuple[int, int], entries: int, values: torch.dtype, side: int) -> Self:
        """Room for a matrix of so many tiles of a side."""
        rows = -(-shape[0] // side)
        order, starts, places = (torch.empty(count, dtype=torch.int32) for count in (rows, rows + 1, entries))
        return cls(shape, order, starts, places, torch.empty(entries, side, side, dtype=values))

    def record(self) -> dict[str, Any]:
        """What `hollow` must be told, as JSON."""
        kind = str(self.tiles.dtype).removeprefix("torch.")
        sizes = {"outputs": self.shape[0], "inputs": self.shape[1], "entries": len(self.tiles), "side": self.side}
        return {"format": self.name, **sizes, "values": kind}

    def problem(self) -> str:
        """Which index points outside of the matrix or its entries; empty where none does."""
        if not torch.equal(self.order.sort().values.long(), torch.arange(len(self.order), device=self.order.device)):
            return "its order has a row of tiles twice"
        if self.starts[0] != 0 or (self.starts.diff() < 0).any() or int(self.starts[-1]) != len(self.places):
            return f"its rows don't begin within its {len(self.places)} tiles"
        within = (self.places >= 0) & (self.places < self.width // self.side)
        return "" if within.all() else f"a tile lies past its {self.shape[1]} inputs"


def in_tiles(weight: Tensor, share: float = 0.9) -> bool:
    """Whether at least that share of the zeros of a matrix (out, in) lies in tiles that are all zero."""
    zeros = int((weight == 0).sum())
    empty = ~(_cut(weight, SIDES[-1]) != 0).flatten(2).any(2)
    return int(empty.sum()) * SIDES[-1] ** 2 >= share * zeros > 0


def _cut(weight: Tensor, side: int) -> Tensor:
    """The tiles (rows, columns, side, side) of a matrix (out, in)."""
    filled = F.pad(weight, (0, -weight.shape[1] % side, 0, -weight.shape[0] % side))
    return filled.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)
