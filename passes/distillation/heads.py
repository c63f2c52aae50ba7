"""Queries, keys and values of one attention, read where its projections give them: modules that the layout names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import TrainingError
from compress.layout import Axis, Layout, Site
from passes.distillation.losses.base import Heads


@dataclass(frozen=True)
class Tap:
    """One attention of a model: the heads and the sites that write them, that of the queries first."""

    model: PreTrainedModel
    axis: Axis
    sites: tuple[Site, ...]
    causal: bool

    @property
    def count(self) -> int:
        """How many heads of queries there are."""
        return self.axis.units * (self.sites[0].width // self.sites[1].width if len(self.sites) > 1 else 1)

    @contextmanager
    def open(self) -> Iterator[dict[str, Tensor]]:
        """Collect what the projections give, by the names of their modules, inside."""
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in {site.module for site in self.sites}:
                module: nn.Module = self.model.get_submodule(name)

                def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                    found[name] = output

                hooks.callback(module.register_forward_hook(keep).remove)
            yield found

    def heads(self, found: Mapping[str, Tensor]) -> Heads:
        """The heads, taken out of what the projections gave."""
        runs = []
        for site in self.sites:
            output = found[site.module]
            columns = self.axis.positions(site, range(self.axis.units)).to(output.device)
            runs.append(output.index_select(-1, columns).unflatten(-1, (self.axis.units, site.width)))
        if len(runs) == 1:  # each head's query, key and value stand together
            runs = list(runs[0].chunk(3, -1))
        places = runs[1].shape[-1]
        queries, keys, values = (run.flatten(2).unflatten(-1, (-1, places)).transpose(1, 2) for run in runs)
        return Heads(queries, keys, values, self.causal)


def tap(model: PreTrainedModel, layout: Layout, block: int | None = None) -> Tap:
    """The attention of a block of the last stack, by its number; without one of the last block that has heads.

    Raises TrainingError where there is none.
    """
    stack = list(layout.stacks.values())[-1]
    numbers = range(stack.length)
    if block is not None and block not in range(-stack.length, stack.length):
        raise TrainingError(f"distill: the teacher has no block {block}; expected one of 0..{stack.length - 1}")
    modules = {name for name, _ in model.named_modules()}
    for number in reversed(numbers) if block is None else [numbers[block]]:
        place = f"{stack.module}.{number}."
        for axis in layout.axes.values():
            sites = tuple(site for site in axis.sites if site.dim == 0 and site.module.startswith(place))
            if axis.kind == "heads" and axis.units and sites and all(site.module in modules for site in sites):
                return Tap(model, axis, sites, bool(stack.caches))
    where = "no block" if block is None else f"not block {block}"
    raise TrainingError(
        f"distill: {where} of '{stack.module}' has heads left; expected some, whose attention to compare"
    )
