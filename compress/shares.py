"""Shares: each of several processes holds a part of every weight, with its gradient and its moments (FSDP2).

A block's weights are gathered when it runs and let go afterwards, so that a process holds one block whole and of all
else its share. PyTorch's `fully_shard` does it, in place; what it put into the modules is taken out again at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def shared(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the processes share the model's weights; afterwards each has all of them, in the same parameters.

    Where an error leaves it, the model stays in shares: what could not be trained in one process can't be in any.
    """
    entries: dict[nn.Module, tuple[type[nn.Module], dict[str, Any]]] = {
        module: (type(module), {name: _copied(entry) for name, entry in vars(module).items()})
        for module in model.modules()
    }
    whole_ones = dict(model.named_parameters())
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # a validation has no backward pass to do it after
    for parameter in whole_ones.values():
        parameter.data = parameter.new_empty(0)
    yield
    for name, share in model.named_parameters():
        whole_ones[name].data = whole(share.detach())
    for module, (kind, held) in entries.items():
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(held)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may hold a share, gathered by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, held: Tensor) -> Tensor:
    """What of a tensor that all processes have is for this one to hold, if `held` is a share."""
    if not isinstance(held, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, held.device_mesh, held.placements, src_data_rank=None)


def clip_(model: nn.Module, beside: nn.Module, most: float) -> float:
    """Scale the gradients down to a norm together, those of a shared model and of what each process has; the norm."""
    parts = [[one for one in module.parameters() if one.grad is not None] for module in (model, beside)]
    norms = [whole(get_total_norm([one.grad for one in part if one.grad is not None])) for part in parts if part]
    norm = torch.stack(norms).norm()
    for part in parts:
        clip_grads_with_norm_(part, most, norm)
    return float(norm)


def _copied(entry: Any) -> Any:
    """An entry of a module; of tables, such as its parameters and its hooks, a copy."""
    return entry.copy() if isinstance(entry, dict) else entry
