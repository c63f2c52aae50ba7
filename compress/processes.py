"""Several processes of one run, as torchrun and accelerate start them: the main one writes, the others wait for it."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast
from torch import nn


def on_cpu() -> bool | None:
    """Whether accelerate has to be told that several processes are to work together on a machine without accelerator.

    It would take each for a run of its own.
    """
    return (torch.distributed.is_torchelastic_launched() and not torch.accelerator.is_available()) or None


def leads() -> bool:
    """Whether this process writes: the only one, or the main one of several."""
    return bool(PartialState(cpu=on_cpu()).is_main_process)


def gather() -> None:
    """Wait until all processes are here."""
    PartialState(cpu=on_cpu()).wait_for_everyone()


def accelerator() -> Accelerator:
    """What knows of devices and processes, for training."""
    # Parameters that the loss does not reach (a pooler, say) would stall distributed training otherwise.
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=on_cpu(), mixed_precision="no", kwargs_handlers=[handler])


def level_(beside: nn.Module, sums: dict[str, float], known: Accelerator) -> dict[str, float]:
    """Bring what is beside a model, and not wrapped for it, to one gradient in all processes; the sums of all added up.

    Its buffers become those of the main process, which counted its own batches alone.
    """
    for parameter in beside.parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = known.reduce(own, "mean")
    for buffer in beside.buffers():
        buffer.copy_(broadcast(buffer))
    added = known.reduce(torch.tensor(list(sums.values()), device=known.device), "sum")
    return dict(zip(sums, added.tolist(), strict=True))
