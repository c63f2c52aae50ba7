"""Peers as passes, so that they stand under the same promise and the same recovery as our own; for benchmarks only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.data.calibration import calibration
from passes.pruning.search.choice import Choice
from passes.pruning.widths.database import Curve
from passes.pruning.widths.structured import StructuredPruning

if TYPE_CHECKING:
    from compress.layout import Axis
    from compress.state import State
    from passes.pruning.promise import Menu
    from passes.pruning.search.fitness import Fitness
    from passes.pruning.widths.database import Fit

SAMPLES, BATCH = 512, 32


class TorchPruning(StructuredPruning):
    """Torch-Pruning's grouped Taylor importance, over its own dependency graph, at one rate for all layers.

    Its groups of channels are an axis' columns, or the places of heads, whose importances are summed for each head, as
    its pruner does. The gradients are those of the task's loss on calibration texts.
    """

    def curves(self, state: State, axes: Sequence[Axis]) -> tuple[dict[str, Curve], Fit | None]:
        """The order in which units go, the least important first; nothing is refitted."""
        import torch_pruning

        model, batches = state.model, list(calibration(state.data, SAMPLES, BATCH))
        inputs = {name: value for name, value in batches[0].items() if name != "labels"}
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, inputs, forward_fn=lambda whole, given: whole(**given), output_transform=lambda found: found.logits
        )
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        score, found = torch_pruning.importance.GroupTaylorImportance(), {}
        for axis in axes:
            writer = model.get_submodule(axis.sites[0].module)
            every = list(range(writer.out_features))
            group = graph.get_pruning_group(writer, torch_pruning.prune_linear_out_channels, idxs=every)
            units = score(group).view(axis.units, -1).sum(1)
            values, order = units.double().sort()
            losses = np.concatenate([[0.0], values.cumsum(0).numpy()])
            found[axis.name] = Curve(tuple(order.tolist()), losses)
        model.zero_grad(set_to_none=True)
        return found, None

    def choice(self, menu: Menu, fitness: Fitness | None) -> Choice:
        """One share for all, its default."""
        return Choice(menu, menu.uniform)
