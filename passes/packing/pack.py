"""Pack: sparse matrices stored without their zeros, where that makes their layer faster on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.contract import GRID, MASKS, Fact, Part, Pass
from compress.errors import TargetError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.sparse.modules import Stored
    from compress.state import State
    from compress.target import Target

BLOCK = 4  # inputs whose weights go together in `blocks`
FORMATS = {"cpu": ("bitmap", "blocks"), "cuda": ("bitmap", "bsr", "semi_int4")}  # for which a device has kernels


class Pack(Pass):
    """Store sparse linear layers packed, for kernels that skip zeros; a layer that doesn't gain by it stays dense.

    ``blocks`` holds int8 codes, four inputs at a time, and rounds weights and activations to them; it wants zeros in
    runs of four. ``bitmap`` holds single weights and computes in float32, on a GPU in bfloat16. ``semi_int4``, there,
    wants two of four inputs zero and rounds the others to four bits with a scale for 128 inputs; ``bsr``, for many rows
    at once, holds square tiles in bfloat16 and wants whole ones that are zero, 16 to 64 wide. Each layer is timed
    here, at the target's batch, sequence and threads, against the best product of torch: on a CPU of float32, and for
    `blocks` of int8 too; on a GPU of bfloat16, and torch's own for two of four zero inputs and for tiles. What comes
    out can't be trained any more. Where training was on a grid of int8 (`qat`), `blocks` has those very codes, and
    layers that stay dense stay on the grid.
    """

    version = 2
    requires: ClassVar[frozenset[Fact]] = frozenset({MASKS})
    keeps: ClassVar[frozenset[Fact]] = frozenset({GRID})
    touches: ClassVar[Part] = Part.FORMAT  # which rounding belongs to

    format: Literal["auto", "bitmap", "blocks", "bsr", "semi_int4"] = Field(
        default="auto",
        description="auto: where nearly all zeros lie so, runs of four in blocks on a CPU, tiles in bsr on a GPU; else "
        "bitmap",
    )
    values: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="bitmap: how weights are stored; auto: float32, for a GPU bfloat16"
    )
    gain: float = Field(default=1.0, ge=0, description="times faster that a layer must be to be packed; 0 packs all")
    seconds: float = Field(default=10.0, gt=0, description="how long layers are timed")

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with layers packed; figures tell each one's times, and why others were left."""
        from compress.sparse.modules import pack_
        from compress.sparse.semi import in_fours

        target = state.target
        self._refuse(target.device)
        layers, skipped = self._sparse(state)
        grid: Mapping[str, Any] = state.facts.get(GRID.name, {})
        packed: dict[str, Stored] = {}
        for name, (weight, _) in layers.items():
            if self.format == "semi_int4" and not in_fours(weight):
                skipped[name] = "more than two of four inputs have weights; expected two at most"
            else:
                packed[name] = self._packed(weight, target.device, row_scales(grid, name))
        rows = target.batch * (1 if target.generate else target.sequence)
        times = self._times(packed, {name: layers[name] for name in packed}, rows, target)
        told: dict[str, Any] = {}
        for name, one in packed.items():
            mine = {kind: found[name] for kind, found in times.items() if name in found}
            gain = min(took for kind, took in mine.items() if kind != "packed") / mine["packed"]
            zeros = 1 - float((layers[name][0] != 0).float().mean())
            told[name] = {"format": one.name, "zeros": zeros, "gain": gain, "milliseconds": mine, "packed": False}
            if gain < self.gain:
                skipped[name] = f"packed it is {gain:.2f} times as fast as dense; expected {self.gain:g}"
            else:
                told[name]["packed"] = True
        taken = {name: one for name, one in packed.items() if told[name]["packed"]}
        dense = sum(layers[name][0].numel() * layers[name][0].element_size() for name in taken)
        pack_(state.model, taken)
        if grid:
            state.give(GRID, {**grid, "layers": [name for name in grid["layers"] if name not in taken]})
        state.figures = {
            "layers": told,
            "rows": rows,
            "skipped": skipped,
            "stored_bytes": {"before": dense, "after": sum(one.bytes for one in taken.values())},
        }
        yield state

    def _refuse(self, device: str) -> None:
        """Raise TargetError where the options don't suit a device."""
        if self.format not in (known := ("auto", *FORMATS[device])):
            raise TargetError(f"pack: format '{self.format}' on device '{device}'; expected {' or '.join(known)}")
        if device == "cuda" and self.values == "float32":
            raise TargetError("pack: values 'float32' on device 'cuda'; expected auto or bfloat16")

    def _times(
        self,
        packed: Mapping[str, Stored],
        layers: Mapping[str, tuple[Tensor, Tensor | None]],
        rows: int,
        target: Target,
    ) -> dict[str, dict[str, float]]:
        """Milliseconds of each layer, packed and by the ways of torch."""
        import torch

        from passes.packing import gate

        if target.device == "cuda":
            return gate.milliseconds_on_gpu(packed, layers, rows, torch.bfloat16, self.seconds)
        candidates = {"packed": gate.packed_calls(packed, layers), "dense": gate.dense_calls(layers)}
        whole = {name: layers[name] for name, one in packed.items() if one.name == "blocks"}
        if whole and (calls := gate.int8_calls(whole)):
            candidates["dense_int8"] = calls
        widths = {name: one.shape[1] for name, one in packed.items()}
        return gate.milliseconds(candidates, widths, rows, target.threads, self.seconds)

    def _sparse(self, state: State) -> tuple[dict[str, tuple[Tensor, Tensor | None]], dict[str, str]]:
        """Matrices (out, in) and biases of the layers that have masks, on the CPU, and why others have none here."""
        from passes.blocks import matrices_of
        from passes.pruning.sparse.sparsity import stored
        from passes.watch import blocks_of

        masks: Mapping[str, Tensor] = state.facts[MASKS.name]
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        skipped: dict[str, str] = {}
        shared: dict[int, list[str]] = {}
        for name, module in state.model.named_modules(remove_duplicate=False):
            if getattr(module, "weight", None) is not None:
                shared.setdefault(id(module.weight), []).append(name)
        for block in blocks_of(state.layout):
            for name, layer in matrices_of(state.model, block, {})[0].items():
                if f"{name}.weight" not in masks:
                    skipped[name] = "it was not made sparse"
                elif len(shared[id(layer.weight)]) > 1:
                    others = [other for other in shared[id(layer.weight)] if other != name]
                    skipped[name] = f"its matrix is that of {others[0]}"
                else:
                    bias = None if layer.bias is None else layer.bias.detach().cpu()
                    found[name] = (stored(layer, layer.weight.detach()).cpu().contiguous(), bias)
        return found, skipped

    def _packed(self, weight: Tensor, device: str, scales: Tensor | None) -> Stored:
        """A matrix (out, in) in the format that was asked, or that fits its zeros; by its rows' `scales` if it has."""
        import torch

        from compress.sparse.bsr import Bsr, in_tiles
        from compress.sparse.formats import Bitmap, Blocks, round_rows
        from compress.sparse.semi import SemiInt4

        if self.format == "semi_int4":
            return SemiInt4.pack(weight)
        if self.format == "bsr" or (self.format == "auto" and device == "cuda" and in_tiles(weight)):
            return Bsr.pack(weight.to(torch.bfloat16))
        if self.format == "blocks" or (self.format == "auto" and device == "cpu" and in_runs(weight)):
            codes = (
                round_rows(weight) if scales is None else ((weight / scales[:, None]).round().to(torch.int8), scales)
            )
            return Blocks.pack(*codes)
        kind = self.values if self.values != "auto" else "bfloat16" if device == "cuda" else "float32"
        return Bitmap.pack(weight.to(getattr(torch, kind)))


def row_scales(grid: Mapping[str, Any], name: str) -> Tensor | None:
    """The scale of each row (out,) of a layer whose weights are int8 codes, as far below 0 as above; None elsewhere."""
    if grid.get("bits") != 8 or name not in grid["layers"] or grid[f"{name}.scale"].shape[1] > 1:
        return None
    middle = bool((grid[f"{name}.zero"] == 128).all())
    return grid[f"{name}.scale"][:, 0] if middle else None


def in_runs(weight: Tensor, share: float = 0.9) -> bool:
    """Whether at least that share of the zeros of a matrix (out, in) lies in runs of four inputs that are all zero."""
    inputs = weight.shape[1] // BLOCK * BLOCK
    zero = weight[:, :inputs].unflatten(1, (-1, BLOCK)) == 0
    return bool(zero.all(2).sum() * BLOCK >= share * zero.sum())
