"""Gptq: the weights of all blocks on a grid of few bits, each matrix rounded so that its outputs stay near."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.contract import GRID, MASKS, Fact, Part, Pass
from compress.data.calibration import BATCH, calibration

if TYPE_CHECKING:
    from torch import Tensor

    from compress.state import State


class Gptq(Pass):
    """Round the matrices of all blocks to grids of few bits (Frantar et al., "GPTQ", 2022), block after block.

    Each block is calibrated on what the blocks before it give once they are rounded. The model stays one of floats,
    which lie on the grid; an export with `quantize: weight_only` stores their codes. Embeddings and heads stay as they
    are, and so do zeros.
    """

    provides: ClassVar[frozenset[Fact]] = frozenset({GRID})
    keeps: ClassVar[frozenset[Fact]] = frozenset({MASKS})
    touches: ClassVar[Part] = Part.VALUES | Part.FORMAT

    bits: Literal[8, 4, 3] = 4
    group: int | None = Field(default=128, ge=1, description="inputs that share a scale; null: a row has one")
    symmetric: bool = Field(default=False, description="whether grids reach as far below 0 as above")
    method: Literal["gptq", "rtn"] = Field(default="gptq", description="rtn rounds each weight to the nearest value")
    order: bool = Field(default=True, description="round the inputs that vary most first")
    damping: float = Field(default=0.01, gt=0)
    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=BATCH, ge=1)

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with its weights on the grid, and the grid as a fact."""
        import torch
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from compress.progress import track
        from compress.statistics import moments
        from passes.blocks import entered, matrices_of, put_everywhere
        from passes.gram import output_error

        batches = list(calibration(state.data, self.samples, self.batch_size))
        grid: dict[str, Any] = {"bits": self.bits, "layers": [], "groups": {}}
        losses: dict[str, float] = {}
        skipped: dict[str, str] = {}
        seen: dict[int, str] = {}
        blocks = sum(stack.length for stack in state.layout.stacks.values())
        for block in track(entered(state.model, state.layout, batches), "gptq", blocks):
            layers, shared = matrices_of(state.model, block.name, seen)
            skipped |= shared
            if not layers:
                continue
            facts = moments(state.model, list(layers), block.calls, call=block.run)
            for name, layer in layers.items():
                turned = isinstance(layer, Conv1D)
                weight = layer.weight.detach().T if turned else layer.weight.detach()
                gram = facts.pop(f"{name}.gram")
                rounded, scale, zero, group = self._rounded(weight, gram)
                losses[name] = output_error(rounded - weight, gram) / max(output_error(weight, gram), 1e-30)
                stored = (rounded.T if turned else rounded).contiguous().to(weight.dtype)
                put_everywhere(state.model, layer.weight, nn.Parameter(stored, layer.weight.requires_grad))
                seen[id(layer.weight)] = name
                grid |= {f"{name}.scale": scale, f"{name}.zero": zero.to(torch.uint8)}
                grid["layers"].append(name)
                grid["groups"][name] = group
        state.give(GRID, grid)
        state.figures = {
            "loss": sum(losses.values()) / max(len(losses), 1),
            "losses": losses,
            "skipped": skipped,
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches if "attention_mask" in batch),
        }
        yield state

    def _rounded(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """A matrix (out, in) on its grid, with the grid's scales, zeros and the size of its groups."""
        from passes.quantization.grid import Grid
        from passes.quantization.solve import gptq

        group = min(self.group or weight.shape[1], weight.shape[1])
        if self.method == "rtn":
            grid = Grid.fit(weight, self.bits, group, self.symmetric)
            rounded = grid.nearest(weight)
        else:
            rounded, grid, _ = gptq(
                weight, gram, self.bits, group, symmetric=self.symmetric, order=self.order, damping=self.damping
            )
        return rounded, grid.scale, grid.zero, group
