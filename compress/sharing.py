"""Blocks that compute with the matrices of another block: one copy in memory and on disk, while norms stay private.

Sharing is identity: the parameters of the sharer *are* those of the source, the same objects, so that deepcopy, moving
to a device and training keep it. The record says ``shared: {block: the block it takes its matrices from}`` and
``cured: {block: rank of its low-rank deltas}``, with names as in the base model. FoldGPT, arXiv:2407.00928.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.errors import LayoutError, nearest
from compress.lowrank import add_deltas_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.layout import Axis

DECLARATION = "_tied_weights_keys"  # where save_pretrained looks, in every module, for what it may leave out


def matrices(block: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of two dimensions or more and the biases beside them, by their names in the block."""
    found: dict[str, nn.Parameter] = {}
    for path, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim >= 2:
            entries = {name: module._parameters.get(name) for name in ("weight", "bias")}
            found |= {f"{path}.{name}": one for name, one in entries.items() if one is not None}
    return found


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks could use the same matrices: the same names and shapes."""
    shapes = [{name: tensor.shape for name, tensor in matrices(block).items()} for block in (one, other)]
    return shapes[0] == shapes[1] != {}


def share_(model: PreTrainedModel, record: dict[str, Any], shared: Mapping[str, str]) -> None:
    """Let each block in `shared` take the matrices of its source, in place, and enter it in the record."""
    _check(model, shared)
    tie_(model, shared)
    record["shared"] = dict(shared)


def cure_(model: PreTrainedModel, record: dict[str, Any], cured: Mapping[str, int]) -> None:
    """Give the linear layers of each block in `cured` low-rank deltas of that rank, and enter it in the record."""
    for name, rank in cured.items():
        add_deltas_(_block(model, name), rank)
    record["cured"] = dict(cured)


def tie_(model: PreTrainedModel, shared: Mapping[str, str]) -> None:
    """Make the matrices of each block those of its source, and tell `save_pretrained` which copy to leave out.

    Blocks are no pretrained models, so what they declare is read when saving and never when embeddings are tied.
    """
    for name, origin in shared.items():
        block, source = _block(model, name), _block(model, origin)
        held = matrices(source)
        for path, parameter in held.items():
            owner, _, entry = path.rpartition(".")
            setattr(block.get_submodule(owner), entry, parameter)
        vars(block)[DECLARATION] = {path: path for path in held}
        vars(source).pop(DECLARATION, None)


def hollow_(model: PreTrainedModel, shared: Mapping[str, str]) -> None:
    """Take away the matrices that a checkpoint does not hold, so that loading misses none and initialises none."""
    _check(model, shared)
    for name in shared:
        block = _block(model, name)
        for path in matrices(block):
            owner, _, entry = path.rpartition(".")
            block.get_submodule(owner).register_parameter(entry, None)
        for module in block.modules():
            vars(module)["_is_hf_initialized"] = True


def follow_drop_(model: PreTrainedModel, record: dict[str, Any], rename: Callable[[str], str | None]) -> None:
    """Rename what is shared and cured after blocks were dropped; where a source went, the next of its group is one."""
    groups: dict[str, list[str]] = {}
    for block, source in record.pop("shared", {}).items():
        groups.setdefault(source, [source]).append(block)
    left = [[new for old in group if (new := rename(old)) is not None] for group in groups.values()]
    cured = {rename(block): rank for block, rank in record.pop("cured", {}).items()}
    if shared := {block: group[0] for group in left for block in group[1:]}:
        share_(model, record, shared)
    if cured := {block: rank for block, rank in cured.items() if block is not None}:
        record["cured"] = cured


def refuse_folded(record: Mapping[str, Any], prefix: str, axis: Axis) -> None:
    """Raise LayoutError where an axis shows in a block that shares its matrices or has low-rank deltas."""
    shared, cured = record.get("shared", {}), record.get("cured", {})
    for block in (*shared, *shared.values(), *cured):
        if any(site.module.startswith(f"{prefix}{block}.") for site in axis.sites):
            raise LayoutError(
                f"axis '{axis.name}' shows in block '{block}', whose matrices are shared; expected cuts before folding"
            )


def _check(model: PreTrainedModel, shared: Mapping[str, str]) -> None:
    """Raise LayoutError where a block can't take the matrices of its source."""
    for name, origin in shared.items():
        if origin in shared:
            raise LayoutError(f"block '{name}' takes from '{origin}', which has no matrices but '{shared[origin]}''s")
        if not alike(_block(model, name), _block(model, origin)):
            raise LayoutError(f"blocks '{name}' and '{origin}' differ in shape; expected like blocks to share matrices")


def _block(model: PreTrainedModel, name: str) -> nn.Module:
    """The block of that name in the base model."""
    known = dict(model.base_model.named_modules())
    if name not in known:
        raise LayoutError(f"no block '{name}' in this model{nearest(name, known)}")
    return known[name]
