"""Obert: zeros where the loss itself can bear them, by its curvature, ranked over all matrices of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from compress.data.calibration import calibration
from passes.pruning.sparse.sparsity import Sparsifying, matrices, stored

if TYPE_CHECKING:
    from torch import Tensor

    from compress.state import State

SEVERAL = 16  # gradients that are added at once
SOLVED = 4096  # blocks whose weights are solved for at once
Batch = Mapping[str, "Tensor"]


class Obert(Sparsifying):
    """Set the weights to zero that cost the model's own loss least, the others making up for them: oBERT.

    Costs are those of the empirical Fisher matrix in blocks of `size` weights, of so many `gradients`, each of a batch
    of `batch_size` rows of the calibration split. All matrices compete, so that each gets the share of zeros that it
    can bear. The way from the share that there is to the one asked for is gone in `recomputations` equal parts, with
    gradients taken anew for each. Of the inverse matrices, `size` floats a weight, as many are held in memory as
    `memory` allows, and the gradients taken once for each such part of the model; they wait on disk. `damping` is told
    as for Gram matrices, by a share: how large gradients are depends on the loss, and on the rows it is the mean of.
    """

    gradients: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1, description="rows whose mean loss gives a gradient; 1: one a sample")
    size: int = Field(default=32, ge=1, description="weights of a block of the Fisher matrix")
    damping: float = Field(default=0.01, gt=0, description="added to its diagonal, times the gradients' mean square")
    recomputations: int = Field(default=4, ge=1)
    memory: float = Field(default=4.0, gt=0, description="GiB for the inverses of the matrices looked at together")

    @model_validator(mode="after")
    def _blocks_hold_runs(self) -> Obert:
        run = self.runs.of if self.runs else self.block
        if self.size % run:
            raise ValueError(f"blocks of {self.size} weights cut through runs of {run}; expected a multiple as size")
        return self

    def sparsify(self, state: State, former: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Go from the present share of zeros to the one asked for."""
        import torch
        from torch import nn

        from passes.blocks import put_everywhere

        layers, skipped = matrices(state, self.pattern)
        for layer in layers.values():  # the memory of their weights may be another's too
            own = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
            put_everywhere(state.model, layer.weight, own)
        batches = list(calibration(state.data, self.gradients * self.batch_size, self.batch_size))
        gone = {name: torch.zeros_like(stored(layer, layer.weight), dtype=torch.bool) for name, layer in layers.items()}
        gone |= {name: stored(layers[name], ~former[f"{name}.weight"]) for name in gone if f"{name}.weight" in former}
        whole = sum(one.numel() for one in gone.values())
        begun = sum(int(one.sum()) for one in gone.values()) / whole
        costs = []
        for turn in range(1, self.recomputations + 1):
            share = begun + (self.pattern.sparsity - begun) * turn / self.recomputations
            costs.append(self.go(state, layers, gone, batches, share))
        sample = "one sample" if self.batch_size == 1 else f"a batch of {self.batch_size}"
        told = {"gradients": len(batches), "gradient_of": sample, "costs": costs, "skipped": skipped}
        return {f"{name}.weight": stored(layers[name], ~one) for name, one in gone.items()}, told

    def go(
        self, state: State, layers: Mapping[str, Any], gone: dict[str, Tensor], batches: Sequence[Batch], share: float
    ) -> float:
        """Let the cheapest weights of all layers go until `share` has gone, in place; returns what they cost in sum."""
        import torch
        from safetensors.torch import load_file

        from passes.pruning.sparse.fisher import blocked, candidates, unblocked, without

        folder = state.workshop.step / "fisher"
        goes, costs = {}, {}
        for name, path in self.inverses(state, layers, gone, batches, folder):
            layer = layers[name]
            weight = blocked(stored(layer, layer.weight.detach()), self.size)
            goes[name], found = candidates(weight, load_file(path)["inverse"].to(weight.device), self.pattern)
            costs[name] = found.flatten()[: layer.weight.numel() // self.pattern.run]  # none of what fills the last
        every = torch.cat(list(costs.values()))
        of_a_run = self.pattern.sparsity if self.runs else 1.0  # that goes when it goes
        order = every.argsort(stable=True)[: round(share / of_a_run * len(every))]
        chosen = torch.zeros_like(every, dtype=torch.bool)
        chosen[order] = True
        for (name, layer), mine in zip(layers.items(), chosen.split([len(one) for one in costs.values()]), strict=True):
            weight = stored(layer, layer.weight.detach())
            runs = goes.pop(name).flatten(0, 1)
            taken = torch.nn.functional.pad(mine, (0, len(runs) - len(mine)))[:, None] & runs
            out = taken.view(-1, self.size) | blocked(gone[name], self.size)
            inverse = load_file(folder / f"{name}.safetensors")["inverse"].to(weight.device)
            parts = (one.split(SOLVED) for one in (blocked(weight, self.size), inverse, out))
            new = torch.cat([without(*part) for part in zip(*parts, strict=True)])
            layer.weight.data = stored(layer, unblocked(new, weight).to(weight.dtype))
            gone[name] = unblocked(out, weight)
        return float(every[order].sum())

    def inverses(
        self,
        state: State,
        layers: Mapping[str, Any],
        gone: Mapping[str, Tensor],
        batches: Sequence[Batch],
        folder: Path,
    ) -> Iterator[tuple[str, Path]]:
        """The name of each layer, in order, and the file that its inverse Fisher matrix was written to."""
        import torch
        from safetensors.torch import save_file

        from compress.progress import track
        from passes.pruning.sparse.fisher import add_gradients_, blocked, inverse_fisher
        from passes.pruning.sparse.gradients import by_weights

        folder.mkdir(parents=True, exist_ok=True)
        damping = self.damping * mean_square(by_weights(state, layers, gone, batches[:SEVERAL]), gone)
        for names in self.grouped(layers):
            inverses = {}
            for name in names:
                weight = blocked(layers[name].weight.detach(), self.size)
                inverses[name] = inverse_fisher(len(weight), self.size, damping, weight)
            held: dict[str, list[Tensor]] = {name: [] for name in names}
            mine = {name: layers[name] for name in names}
            for number, found in enumerate(by_weights(state, mine, gone, track(batches, "gradients", len(batches))), 1):
                for name, gradient in found.items():
                    held[name].append(blocked(gradient, self.size))
                    if number % SEVERAL == 0 or number == len(batches):
                        add_gradients_(inverses[name], torch.stack(held[name]), len(batches))
                        held[name].clear()
            for name in names:
                path = folder / f"{name}.safetensors"
                save_file({"inverse": inverses.pop(name)}, path)
                yield name, path

    def grouped(self, layers: Mapping[str, Any]) -> list[list[str]]:
        """Names of the layers in order, in groups whose inverses fit into memory, one layer at least."""
        groups: list[list[str]] = []
        left = 0.0
        for name, layer in layers.items():
            bytes_ = layer.weight.numel() * layer.weight.element_size() * (self.size + SEVERAL)
            if not groups or bytes_ > left:
                groups.append([])
                left = self.memory * 2**30
            groups[-1].append(name)
            left -= bytes_
        return groups


def mean_square(gradients: Iterable[Mapping[str, Tensor]], gone: Mapping[str, Tensor]) -> float:
    """Of the gradients of all weights that aren't gone."""
    squares = [sum(float(one.square().sum()) for one in found.values()) for found in gradients]
    held = sum(int((~one).sum()) for one in gone.values())
    return max(sum(squares) / len(squares) / held, 1e-30)
