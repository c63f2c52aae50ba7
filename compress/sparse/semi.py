"""Two of four inputs have weights, of four bits each with a scale for each group: 3.125 bits a weight, for GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import LayoutError
from compress.sparse.formats import Format, NOfM, codes, words

KEEP, OF = 2, 4
BITS, LARGEST, ZERO = 4, 7, 8  # of a code: it is stored as 8 more
RUN = 64  # inputs that a lane takes, so that groups are multiples of it


@dataclass(frozen=True)
class SemiInt4(Format):
    """`codes` (out, width / 16) int32 of the kept weights, `positions` (out, width / 32) int32 as of NOfM, `scale`.

    `scale` (out, width / group) is bfloat16 or float16; a weight is its code times its scale, rounded to that type. The
    width is that of whole groups.
    """

    codes: Tensor
    positions: Tensor
    scale: Tensor

    name: ClassVar[str] = "semi_int4"

    @classmethod
    def pack(cls, weight: Tensor, group: int = 128, values: torch.dtype = torch.bfloat16) -> Self:
        """Round a matrix (out, in) to codes; raises LayoutError where more than two of four aren't zero."""
        if group <= 0 or group % RUN:
            raise LayoutError(f"groups of {group} inputs; expected a multiple of {RUN}")
        shape = (weight.shape[0], weight.shape[1])
        sparse = NOfM.pack(F.pad(weight, (0, -weight.shape[1] % group)), KEEP, OF)
        groups = sparse.values.float().unflatten(1, (-1, group * KEEP // OF))
        scale = (groups.abs().amax(2) / LARGEST).to(values)
        worth = torch.where(scale > 0, scale.float(), 1.0)[:, :, None]
        whole = (groups / worth).round().clamp(-LARGEST, LARGEST).flatten(1).to(torch.int32)
        return cls(shape, words(whole + ZERO, BITS), sparse.positions, scale)

    @property
    def width(self) -> int:
        """Inputs with those that fill up the last group."""
        return self.codes.shape[1] * 32 // BITS * OF // KEEP

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.width // self.scale.shape[1]

    def unpack(self) -> Tensor:
        """The matrix (out, in), zeros and all, of the scale's type."""
        whole = (codes(self.codes, BITS) - ZERO).to(self.scale.dtype)
        values = whole.unflatten(1, (-1, self.group * KEEP // OF)) * self.scale[:, :, None]
        sparse = NOfM((self.shape[0], self.width), KEEP, OF, values.flatten(1), self.positions)
        return sparse.unpack()[:, : self.shape[1]].contiguous()

    @classmethod
    def hollow(cls, shape: tuple[int, int], entries: int, values: torch.dtype) -> Self:
        """Room for a matrix of groups of so many inputs."""
        width = -(-shape[1] // entries) * entries
        packed, positions = (torch.empty(shape[0], width // each, dtype=torch.int32) for each in (16, 32))
        return cls(shape, packed, positions, torch.empty(shape[0], width // entries, dtype=values))

    def record(self) -> dict[str, Any]:
        """What `hollow` must be told, as JSON."""
        kind = str(self.scale.dtype).removeprefix("torch.")
        outputs, inputs = self.shape
        return {"format": self.name, "outputs": outputs, "inputs": inputs, "entries": self.group, "values": kind}

    def problem(self) -> str:
        """Which index points outside of the matrix or its entries; empty where none does."""
        width = (self.shape[0], self.width)
        return NOfM(width, KEEP, OF, self.codes.new_empty(len(self.codes), self.width // 2), self.positions).problem()


def in_fours(weight: Tensor) -> bool:
    """Whether at most two of each four inputs of a matrix (out, in) have weights."""
    runs = F.pad(weight, (0, -weight.shape[1] % OF)).unflatten(1, (-1, OF))
    return bool(((runs != 0).sum(2) <= KEEP).all())
