"""The prunable structure of a model as data: axes, the sites where each axis shows, and the one way to cut them.

An *axis* is a width shared by several weights: the heads of a layer (a key-value head with its query heads, under
grouped queries), the columns of a feed-forward layer. A *site* is one place where it shows. Sites use the view
``y = W x`` with ``W`` of shape (out, in) whatever the storage: dim 0 are the outputs (weight rows and bias), dim 1
the inputs; `transformers`' Conv1D and `torch`'s Embedding store the transpose, and only `stored_dim` knows.

Cutting a unit equals silencing it: the outputs that made it go, and so do the inputs that read it. What a unit left
in the reader's bias stays. When the last unit of an axis goes, the modules named in `bypass` go as well and the
reader's bias, if it has one, is all that is left; so a whole attention or feed-forward layer is removed by the same
call, and the law holds there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.constant import Absent, Constant
from compress.declared import declare_
from compress.errors import LayoutError, nearest
from compress.record import own_record, prefix_of, record_of
from compress.sharing import follow_drop_, refuse_folded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Site:
    """A place where an axis shows: `width` rows (dim 0) or columns (dim 1) of `module` for each unit.

    `offset` tells runs apart where several share a matrix: the run begins at ``units * offset``.
    """

    module: str
    dim: int
    width: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Axis:
    """A width shared by several weights.

    `kind` is ``heads`` or ``columns``; `block` the transformer block it belongs to (empty where blocks share it);
    `attributes` are (module, attribute, value per unit) that the forward pass reads; `bypass` are (module, number of
    further outputs) that go with the last unit; `least` is the smallest size the model can run with; `entries` are
    (entry, value per unit) by which the config of a model whose blocks are alike tells the size.
    """

    name: str
    kind: str
    block: str
    units: int
    sites: tuple[Site, ...]
    attributes: tuple[tuple[str, str, int], ...] = ()
    bypass: tuple[tuple[str, int], ...] = ()
    least: int = 0
    entries: tuple[tuple[str, int], ...] = ()

    @property
    def readers(self) -> tuple[Site, ...]:
        """The sites that read the axis: the output projections."""
        return tuple(site for site in self.sites if site.dim == 1)

    def positions(self, site: Site, units: Sequence[int]) -> Tensor:
        """Indices, along the site's dimension, of the given units; shape (len(units) * width,)."""
        start = self.units * site.offset + torch.tensor(list(units), dtype=torch.long, device="cpu") * site.width
        return (start[:, None] + torch.arange(site.width, device="cpu")).flatten()


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after another.

    `counts` are (module, entry of its config) with the length, `lists` the entries of the model's config with a value
    for each block. The first `anchored` blocks hold what the others use and can't be dropped. `caches` is, in decoders,
    the kind of cache of each block: the first of a kind tells how long the cache is, so it keeps a head.
    """

    module: str
    length: int
    counts: tuple[tuple[str, str], ...] = (("", "num_hidden_layers"),)
    lists: tuple[str, ...] = ()
    anchored: int = 0
    caches: tuple[str, ...] = ()

    @property
    def leaders(self) -> tuple[str, ...]:
        """Names of the heads that tell the length of a cache."""
        return tuple(f"{self.module}.{self.caches.index(kind)}.heads" for kind in dict.fromkeys(self.caches))


@dataclass(frozen=True)
class Layout:
    """All axes and stacks of one model at its present sizes; a cut gives the next layout."""

    axes: Mapping[str, Axis]
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def axis(self, name: str) -> Axis:
        """The axis of that name; raises LayoutError with the nearest name."""
        if name not in self.axes:
            raise LayoutError(f"no axis '{name}' in this model{nearest(name, self.axes)}")
        return self.axes[name]

    def cut(self, model: PreTrainedModel, name: str, keep: Sequence[int]) -> Layout:
        """Keep only the units `keep` of an axis, in place, and record the new size in the model's config."""
        axis, keep = self._choose(model, name, keep)
        if len(keep) < axis.least:
            raise LayoutError(f"axis '{name}' needs at least {axis.least} of its {axis.units} units, {len(keep)} asked")
        if len(keep) == axis.units:
            return self
        record = own_record(model)
        _narrow_(model, axis, keep) if keep else _remove_(model, axis)
        record["sizes"][name.removeprefix(prefix_of(model))] = len(keep)
        return replace(self, axes={**self.axes, name: replace(axis, units=len(keep))})

    def silence(self, model: PreTrainedModel, name: str, units: Sequence[int]) -> None:
        """Zero the columns that read `units`, in place: the model computes what it would if they were cut."""
        axis, units = self._choose(model, name, units)
        with torch.no_grad():
            for site in axis.readers if units else ():
                module: Any = model.get_submodule(site.module)
                dim = stored_dim(module, site.dim)
                module.weight.index_fill_(dim, axis.positions(site, units).to(module.weight.device), 0.0)

    def _choose(self, model: PreTrainedModel, name: str, units: Sequence[int]) -> tuple[Axis, list[int]]:
        """The axis of that name and the units, each once and in order; raises LayoutError where it hasn't them."""
        axis, units = self.axis(name), sorted(set(units))
        refuse_folded(record_of(model.config), prefix_of(model), axis)
        if units and not 0 <= units[0] <= units[-1] < axis.units:
            raise LayoutError(f"axis '{name}' has {axis.units} units, asked for {units[0]}..{units[-1]} counted from 0")
        return axis, units

    def drop(self, model: PreTrainedModel, stack: str, keep: Sequence[int]) -> Layout:
        """Keep only the blocks `keep` of a stack, in place; renumbers layers, caches and per-layer config lists."""
        if stack not in self.stacks:
            raise LayoutError(f"no stack '{stack}' in this model{nearest(stack, self.stacks)}")
        old, keep = self.stacks[stack], sorted(set(keep))
        if keep[: old.anchored] != list(range(old.anchored)) or not keep or keep[0] < 0 or keep[-1] >= old.length:
            held = f" and the first {old.anchored} must stay" if old.anchored else ""
            raise LayoutError(f"stack '{stack}' has blocks 0..{old.length - 1}{held}, asked to keep {keep}")
        if len(keep) == old.length:
            return self
        new = replace(old, length=len(keep), caches=tuple(old.caches[i] for i in keep) if old.caches else ())
        order = {origin: index for index, origin in enumerate(keep)}
        axes = [moved for axis in self.axes.values() if (moved := _move(axis, stack, order)) is not None]
        axes = [replace(axis, least=1) if axis.name in new.leaders else axis for axis in axes]
        for axis in axes:
            if axis.units < axis.least:
                raise LayoutError(f"'{axis.name}' would tell how long the cache is, but has no heads left")
        record, plain = own_record(model), stack.removeprefix(prefix_of(model))
        stacks = {**self.stacks, stack: new}
        _drop_(model, old, keep)
        _count_(model, stacks)
        origins = record["blocks"].get(plain, list(range(old.length)))
        record["blocks"][plain] = [origins[i] for i in keep]
        sizes = {_rename(name, plain, order): size for name, size in record["sizes"].items()}
        record["sizes"] = {name: size for name, size in sizes.items() if name is not None}
        follow_drop_(model, record, lambda name: _rename(name, plain, order))
        if "linear" in record:
            renamed = [_rename(name, plain, order) for name in record["linear"]]
            record["linear"] = [name for name in renamed if name is not None]
        return Layout({axis.name: axis for axis in axes}, stacks)


def stored_dim(module: nn.Module, dim: int) -> int:
    """Where a dimension of the (out, in) view lies in the stored weight."""
    return 1 - dim if isinstance(module, Conv1D | nn.Embedding) else dim


def _narrow_(model: PreTrainedModel, axis: Axis, keep: Sequence[int]) -> None:
    """Keep some units of an axis at every site; the runs of one matrix are cut at once, or their places would shift."""
    lost = sorted(set(range(axis.units)) - set(keep))
    places: dict[tuple[str, int], list[Site]] = {}
    for site in axis.sites:
        places.setdefault((site.module, site.dim), []).append(site)
    for (path, dim), sites in places.items():
        module: Any = model.get_submodule(path)
        stored = stored_dim(module, dim)
        held = torch.ones(module.weight.shape[stored], dtype=torch.bool, device="cpu")
        for site in sites:
            held[axis.positions(site, lost)] = False
        _select_(module, stored, held.nonzero().flatten(), bias=dim == 0)
    for path, attribute, per_unit in axis.attributes:
        setattr(model.get_submodule(path), attribute, per_unit * len(keep))


def _select_(module: Any, stored: int, index: Tensor, bias: bool) -> None:
    """Keep `index` along the stored dimension of a weight, and of the bias, and mend the declared features."""
    index = index.to(module.weight.device)
    weight = module.weight.detach().index_select(stored, index)
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    if bias and getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(module.bias.detach().index_select(0, index), requires_grad=module.bias.requires_grad)
    declare_(module)


def _remove_(model: PreTrainedModel, axis: Axis) -> None:
    """Put what is left, the readers' constants, where the modules of an axis were."""
    constants = {}
    for site in axis.readers:
        module: Any = model.get_submodule(site.module)
        features = module.weight.shape[stored_dim(module, 0)]
        constants[site.module] = Constant(features, getattr(module, "bias", None))
    for path, extra in axis.bypass:
        inside = [name for name in constants if name.startswith(f"{path}.")]
        reader = (inside[0].removeprefix(f"{path}."), constants.pop(inside[0])) if inside else None
        model.set_submodule(path, Absent(extra, reader))
    for path, constant in constants.items():
        model.set_submodule(path, constant)


def _drop_(model: PreTrainedModel, stack: Stack, keep: Sequence[int]) -> None:
    """Keep the blocks `keep` of a model and mend what is listed by block: cache indices and config entries."""
    blocks = model.get_submodule(stack.module)
    kept = nn.ModuleList(blocks.get_submodule(str(index)) for index in keep)
    model.set_submodule(stack.module, kept)
    for index, block in enumerate(kept):
        for module in block.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = index  # type: ignore[assignment]  # torch types every attribute as tensor or module
    for entry in stack.lists:
        values = getattr(model.config, entry, None)
        if values:
            setattr(model.config, entry, [values[index] for index in keep])


def _count_(model: PreTrainedModel, stacks: Mapping[str, Stack]) -> None:
    """Write the length of every stack to the configs; some entries are needed only once stacks differ in length."""
    for stack in stacks.values():
        for owner, entry in stack.counts:
            part: Any = model.get_submodule(owner)
            setattr(part.config, entry, stack.length)


def _rename(name: str, stack: str, order: Mapping[int, int]) -> str | None:
    """The name after the blocks of `stack` were put in `order`; None where its block is gone."""
    if not name.startswith(f"{stack}."):
        return name
    index, dot, rest = name.removeprefix(f"{stack}.").partition(".")
    return f"{stack}.{order[int(index)]}{dot}{rest}" if int(index) in order else None


def _move(axis: Axis, stack: str, order: Mapping[int, int]) -> Axis | None:
    """The axis after the blocks of `stack` were put in `order`; None where its block is gone."""

    def move(name: str) -> str | None:
        return _rename(name, stack, order)

    if axis.block and move(axis.block) is None:
        return None
    return replace(
        axis,
        name=str(move(axis.name)),
        block=str(move(axis.block)) if axis.block else "",
        sites=tuple(replace(site, module=new) for site in axis.sites if (new := move(site.module))),
        attributes=tuple((new, name, unit) for path, name, unit in axis.attributes if (new := move(path))),
        bypass=tuple((new, extra) for path, extra in axis.bypass if (new := move(path))),
    )
