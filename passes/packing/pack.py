"""Pack: sparse matrices stored without their zeros, where that makes their layer faster on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.contract import MASKS, Fact, Part, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from compress.sparse.modules import Stored
    from compress.state import State

BLOCK = 4  # inputs whose weights go together in `blocks`


class Pack(Pass):
    """Store sparse linear layers packed, for kernels that skip zeros; a layer that doesn't gain by it stays dense.

    ``blocks`` holds int8 codes, four inputs at a time, and rounds weights and activations to them; it wants zeros in
    runs of four. ``bitmap`` holds single weights and computes in float32. Each layer is timed on this machine, at the
    target's batch, sequence and threads, against the best dense product of torch: of float32, and for `blocks` of int8
    too. What comes out can't be trained any more.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({MASKS})
    touches: ClassVar[Part] = Part.VALUES | Part.FORMAT

    format: Literal["auto", "bitmap", "blocks"] = Field(
        default="auto", description="auto: blocks where nearly all zeros lie in runs of four inputs, else bitmap"
    )
    values: Literal["float32", "bfloat16"] = Field(default="float32", description="bitmap: how weights are stored")
    gain: float = Field(default=1.0, ge=0, description="times faster that a layer must be to be packed; 0 packs all")
    seconds: float = Field(default=10.0, gt=0, description="how long layers are timed")

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with layers packed; figures tell each one's times, and why others were left."""
        from compress.sparse.modules import pack_
        from passes.packing.gate import dense_calls, int8_calls, milliseconds, packed_calls

        layers, skipped = self._sparse(state)
        packed = {name: self._packed(weight) for name, (weight, _) in layers.items()}
        candidates = {"packed": packed_calls(packed, layers), "dense": dense_calls(layers)}
        whole = {name: layers[name] for name, one in packed.items() if one.name == "blocks"}
        if whole and (calls := int8_calls(whole)):
            candidates["dense_int8"] = calls
        widths = {name: one.shape[1] for name, one in packed.items()}
        rows = state.target.batch * (1 if state.target.generate else state.target.sequence)
        times = milliseconds(candidates, widths, rows, state.target.threads, self.seconds)
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
        state.figures = {
            "layers": told,
            "rows": rows,
            "skipped": skipped,
            "stored_bytes": {"before": dense, "after": sum(one.bytes for one in taken.values())},
        }
        yield state

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

    def _packed(self, weight: Tensor) -> Stored:
        """A matrix (out, in) in the format that was asked, or that fits its zeros."""
        import torch

        from compress.sparse.formats import Bitmap, Blocks, round_rows

        if self.format == "blocks" or (self.format == "auto" and in_runs(weight)):
            return Blocks.pack(*round_rows(weight))
        return Bitmap.pack(weight.to(getattr(torch, self.values)))


def in_runs(weight: Tensor, share: float = 0.9) -> bool:
    """Whether at least that share of the zeros of a matrix (out, in) lies in runs of four inputs that are all zero."""
    inputs = weight.shape[1] // BLOCK * BLOCK
    zero = weight[:, :inputs].unflatten(1, (-1, BLOCK)) == 0
    return bool(zero.all(2).sum() * BLOCK >= share * zero.sum())
