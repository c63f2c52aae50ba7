"""Sparsify: zeros in all matrices in one go over calibration text, block after block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from compress.data.calibration import BATCH, calibration
from passes.pruning.sparse.sparsity import Sparsifying, stored, unfit

if TYPE_CHECKING:
    from torch import Tensor

    from compress.state import State

METHODS = ("magnitude", "wanda", "sparsegpt", "alps")


class Sparsify(Sparsifying):
    """Set the weights to zero that cost the outputs of their layer least, in one go.

    ``magnitude`` keeps the largest, ``wanda`` the largest times the norm of their input; what stays is left as it is.
    ``sparsegpt`` lets the weights that stay make up for those that go, ``alps`` searches zeros and weights together.
    Each block is calibrated on what the blocks before it give once they are sparse, and one block's activations are
    held at a time. Every matrix has the same `sparsity`, or with ``rates: allocated`` the one by which the model's own
    loss rises least, by its gradients in the dense model and what Wanda's choice would do to the outputs.
    """

    method: Literal["magnitude", "wanda", "sparsegpt", "alps"] = "sparsegpt"
    rates: Literal["uniform", "allocated"] = "uniform"
    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=BATCH, ge=1)

    @model_validator(mode="after")
    def _rates_can_differ(self) -> Sparsify:
        if self.runs and self.rates == "allocated":
            raise ValueError("runs leave every matrix the same share; expected rates: uniform, or sparsity")
        return self

    def sparsify(self, state: State, former: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Go through the blocks."""
        from torch import nn

        from compress.progress import track
        from compress.statistics import moments
        from passes.blocks import entered, matrices_of, put_everywhere
        from passes.gram import output_error
        from passes.pruning.sparse.alps import alps
        from passes.pruning.sparse.oneshot import magnitude, sparsegpt, wanda
        from passes.pruning.sparse.rates import allocated

        solve = dict(zip(METHODS, (magnitude, wanda, sparsegpt, alps), strict=True))[self.method]
        batches = list(calibration(state.data, self.samples, self.batch_size))
        rates = allocated(state, batches, self.pattern) if self.rates == "allocated" else {}
        masks: dict[str, Tensor] = {}
        losses: dict[str, float] = {}
        skipped: dict[str, str] = {}
        seen: dict[int, str] = {}
        blocks = sum(stack.length for stack in state.layout.stacks.values())
        for block in track(entered(state.model, state.layout, batches), f"sparsify by {self.method}", blocks):
            layers, shared = matrices_of(state.model, block.name, seen)
            skipped |= shared
            for name, layer in list(layers.items()):
                if told := unfit(name, stored(layer, layer.weight).shape[1], self.pattern):
                    skipped |= told
                    del layers[name]
            facts = moments(state.model, list(layers), block.calls, call=block.run) if layers else {}
            for name, layer in layers.items():
                weight, gram = stored(layer, layer.weight.detach()), facts.pop(f"{name}.gram")
                held = former.get(f"{name}.weight")
                pattern = self.pattern.at(rates.get(name, self.pattern.sparsity))
                sparse, kept = solve(weight, gram, pattern, None if held is None else stored(layer, held))
                losses[name] = output_error(sparse - weight, gram) / max(output_error(weight, gram), 1e-30)
                new = nn.Parameter(stored(layer, sparse), layer.weight.requires_grad)
                put_everywhere(state.model, layer.weight, new)
                masks[f"{name}.weight"], seen[id(layer.weight)] = stored(layer, kept), name
        loss = sum(losses.values()) / max(len(losses), 1)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches if "attention_mask" in batch)
        return masks, {"loss": loss, "losses": losses, "skipped": skipped, "tokens": tokens}
