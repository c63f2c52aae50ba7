"""An artifact in the place of a model, so that it is judged by the same measures, through its own runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from compress.runtimes import Session


class Opened(nn.Module):
    """Calls an open session as a transformers model is called; `config` is that of the model it was made of."""

    device = torch.device("cpu")

    def __init__(self, session: Session, config: Any) -> None:
        super().__init__()
        self.session, self.config = session, config

    def forward(self, use_cache: bool = False, **inputs: Tensor) -> ModelOutput:
        """The outputs for tensors by input name, but for the caches of decoders: evaluation runs texts as a whole."""
        outputs = self.session({name: value.cpu().numpy() for name, value in inputs.items()})
        return ModelOutput({name: torch.from_numpy(value) for name, value in outputs.items() if "." not in name})
