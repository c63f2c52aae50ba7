"""A training run on disk: one safetensors file whose header holds, as JSON, whose run it is and how far it came."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import TrainingError
from compress.processes import leads
from compress.shares import like, whole

Weights = dict[str, Tensor]


@dataclass
class Progress:
    """Where a run stands after its last whole step; JSON values only.

    `offset` counts the batches taken from `epoch`, `gainless` the validations since the best one; `sums` are the parts
    of the loss over the `since` batches after the last entry of `history`, and `last_loss` is that of the last batch.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_score: float | None = None
    gainless: int = 0
    last_loss: float | None = None
    since: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def weights_of(model: nn.Module, buffers: bool = True) -> Weights:
    """Copies of all that training changes: trained parameters and buffers, shared ones once."""
    tensors: Weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
    tensors |= dict(model.named_buffers()) if buffers else {}
    return {name: one.detach().clone(memory_format=torch.contiguous_format) for name, one in tensors.items()}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model in place."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in weights.items():
        held[name].copy_(like(tensor, held[name]))


def write(
    path: Path, identity: str, progress: Progress, parts: Mapping[str, Weights], optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint, its parts the `weights`, the `best` ones and their `average`; the main process does.

    A kill leaves the one before or this one, never half of it. Where processes hold shares all of them have to call.
    """
    moments = {f"optimizer.{index}": found for index, found in optimizer.state_dict()["state"].items()}
    tensors = {}
    for part, held in {**parts, **moments}.items():
        for name, tensor in held.items():
            gathered = whole(tensor)
            if leads():
                tensors[f"{part}.{name}"] = gathered.contiguous()
    if not leads():
        return
    unfinished = path.with_suffix(".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, unfinished, {"identity": identity, "progress": json.dumps(asdict(progress))})
    os.replace(unfinished, path)


def read(
    path: Path, identity: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, Weights, Weights]:
    """Put a checkpoint back into model and optimizer; returns the progress, the best weights and the average.

    Raises TrainingError where the checkpoint is that of another run.
    """
    parts: dict[str, Weights] = {"weights": {}, "best": {}, "average": {}, "optimizer": {}}
    device = next(model.parameters()).device
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("identity") != identity:
            raise TrainingError(f"{path} is the checkpoint of another run; expected the same options and shapes")
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            part, _, name = key.partition(".")
            parts[part][name] = file.get_tensor(key).to(device)
    moments: dict[int, Weights] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = tensor
    put_weights(model, parts["weights"])
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {name: like(one, trained[index]) if one.ndim else one for name, one in found.items()}
        for index, found in moments.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    best, average = ({name: like(one, held[name]) for name, one in parts[part].items()} for part in ("best", "average"))
    return Progress(**json.loads(header["progress"])), best, average
