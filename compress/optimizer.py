"""The optimizer of a training run."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from compress.recipe import TrainingOptions


def optimizer_of(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW that lets vectors (biases and norms) be when it decays weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = ([one for one in trained if (one.ndim >= 2) == wide] for wide in (True, False))
    groups = [
        {"params": [one for one in kind if isinstance(one, DTensor) == share], "weight_decay": decay}
        for kind, decay in ((matrices, options.weight_decay), (vectors, 0.0))
        for share in (True, False)  # shares of weights, which are the model's, and tensors don't go together
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.learning_rate, fused=True)
