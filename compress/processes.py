"""Several processes of one run, as torchrun and accelerate start them: the main one writes, the others wait for it."""

import torch
from accelerate import PartialState


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
