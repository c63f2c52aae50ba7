"""Crossquant: activations by scales of their row and of their column, the column's part handed to the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.contract import MASKS, Fact, Part, Pass
from compress.data.calibration import BATCH, calibration

if TYPE_CHECKING:
    from torch import Tensor

    from compress.state import State

TOP = 127  # the greatest code of 8 bits
SMALLEST = 1e-5  # magnitude below which a column counts as that


class Crossquant(Pass):
    """Divide what norms give by a power of each channel's largest magnitude, so that less of it is rounded to 0.

    Rounded by rows, one large channel gives its row a step that all small entries vanish below: they are the kernel of
    the rounding, and losing them is what hurts (Liu et al., "CrossQuant", arXiv:2410.07505). The step of an entry is
    there ``t^row c^(1 - row) / 127``, of the largest magnitudes ``t`` of its row and ``c`` of its column.

    The column's part, ``c`` being that of calibration text, is folded: into the norm, and back out of the weights that
    read it, which leaves the model what it was. What is left has no entry above ``t^row``, so that the plain step of
    its rows is as fine as the one above or finer, and nothing else has to be emulated: int8 by rows, or by the whole
    tensor, takes it as it is. Layers that read something other than a norm can't be helped by folding, and stay.
    """

    keeps: ClassVar[frozenset[Fact]] = frozenset({MASKS})
    touches: ClassVar[Part] = Part.VALUES

    row: float = Field(default=0.15, ge=0, le=1, description="power of the row's part; 1: plain rows, nothing moves")
    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=BATCH, ge=1)

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with scales moved.

        Figures tell of each layer of the blocks which share of the entries that it reads is rounded to 0: in steps by
        `row`, in those of `cross`, and by row as it is `after`.
        """
        from passes.blocks import matrices_of
        from passes.quantization.smooth import hand_over_, ranges_of, readers_of
        from passes.watch import blocks_of

        model, batches = state.model, list(calibration(state.data, self.samples, self.batch_size))
        layers = [name for block in blocks_of(state.layout) for name in matrices_of(model, block, {})[0]]
        readers, skipped = readers_of(model, batches[0])
        asked = [*layers, *(name for names in readers.values() for name in names if name not in layers)]
        columns = ranges_of(model, asked, batches)
        before = self._kernels(state, layers, batches, columns)
        for norm, names in readers.items():
            hand_over_(model, norm, names, column_part(columns[names[0]], self.row).to(model.dtype))
        after = self._kernels(state, layers, batches, None)
        folded = {name for names in readers.values() for name in names}
        state.figures = {
            "norms": len(readers),
            "kernels": {name: {**before[name], "after": after[name]["row"]} for name in layers},
            "skipped": skipped | {name: "no norm gives what it reads" for name in layers if name not in folded},
        }
        yield state

    def _kernels(
        self, state: State, layers: Sequence[str], batches: Sequence[Any], columns: Mapping[str, Tensor] | None
    ) -> dict[str, dict[str, float]]:
        """Of each layer, the share of entries other than 0 that become 0 in steps by row and, given columns, across."""
        from passes.watch import read_rows

        lost: dict[str, dict[str, int]] = {name: {} for name in layers}
        met = dict.fromkeys(layers, 0)

        def count(name: str, rows: Tensor) -> None:
            found = {"row": kernel(rows, steps(rows))}
            if columns is not None:
                found["cross"] = kernel(rows, steps(rows, columns[name], self.row))
            met[name] += int((rows != 0).sum())
            lost[name] = {kind: lost[name].get(kind, 0) + some for kind, some in found.items()}

        read_rows(state.model, layers, batches, count)
        return {name: {kind: some / max(1, met[name]) for kind, some in kinds.items()} for name, kinds in lost.items()}


def column_part(columns: Tensor, row: float) -> Tensor:
    """What each column (in,) is divided by, of its largest magnitude; 1 where there is nothing in it."""
    import torch

    return torch.where(columns > 0, columns.clamp(min=SMALLEST) ** (1 - row), 1.0)


def steps(rows: Tensor, columns: Tensor | None = None, row: float = 1.0) -> Tensor:
    """The steps of entries (tokens, in), for those of a `column` too where the row's power is below 1."""
    largest = rows.abs().amax(1, keepdim=True) ** row
    return largest / TOP if columns is None else largest * column_part(columns, row) / TOP


def kernel(rows: Tensor, step: Tensor) -> int:
    """How many entries other than 0 are nearer to 0 than to any other value."""
    return int(((rows != 0) & ((rows / step).round() == 0)).sum())
