"""PyTorch as a runtime: the artifact is a transformers model folder, run as it is, without compilation.

What is timed on a GPU is one forward pass as a replayed graph, as latency tables are, lest launching hide the work.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import TargetError
from compress.runtimes.base import Runtime, Session
from compress.runtimes.examples import example_inputs
from compress.target import Target

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class TorchSession(Session):
    """A transformers model on a device."""

    def __init__(self, model: PreTrainedModel, target: Target) -> None:
        import torch

        torch.set_num_threads(target.threads)
        self.model = model.eval()
        self.model.to(torch.device(target.device))

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model; copying the outputs to the host waits for the device."""
        import torch

        with torch.inference_mode():
            given = {name: torch.as_tensor(value).to(self.model.device) for name, value in inputs.items()}
            outputs = self.model(**given, **uncached(self.model))
        return {name: value.cpu().numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    def ready(self, inputs: Mapping[str, Any]) -> Callable[[], Any]:
        """On a GPU, a replayed graph and a wait; raises TargetError where the model can't be captured as one."""
        if self.model.device.type != "cuda":
            return super().ready(inputs)
        import torch

        from compress import replay

        given = {name: torch.as_tensor(value).to(self.model.device) for name, value in inputs.items()}
        try:
            with torch.inference_mode():
                again = replay.captured(partial(self.model, **given, **uncached(self.model)))
        except RuntimeError as error:
            raise TargetError(f"torch: {type(self.model).__name__} can't be captured as a graph: {error}") from error

        def run() -> None:
            again()
            torch.cuda.synchronize()

        return run

    def example(self, batch: int, sequence: int) -> dict[str, np.ndarray]:
        """Inputs as the model's config describes them."""
        return {name: value.numpy() for name, value in example_inputs(self.model, None, batch, sequence).items()}

    def generate(self, prompt: np.ndarray, count: int) -> np.ndarray:
        """Run the prompt, then one token after another; like transformers' own `generate`, the last logits only."""
        import torch

        taken, kept = inspect.signature(self.model.forward).parameters, cache_argument(self.model)
        if self.model.config.is_encoder_decoder or not self.model.can_generate():
            raise TargetError(f"torch: {type(self.model).__name__} has no key-value cache to generate with")
        last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        new, cache, tokens = torch.as_tensor(prompt).to(self.model.device), None, []
        with torch.inference_mode():
            for _ in range(count):
                outputs = self.model(input_ids=new, use_cache=True, **{kept: cache}, **last)
                cache = outputs[kept]
                new = outputs.logits[:, -1:].argmax(dim=-1)
                tokens.append(new)
        return torch.cat(tokens, dim=1).cpu().numpy()


class TorchRuntime(Runtime):
    """Plain PyTorch."""

    name = "torch"
    package = "torch"

    def holds(self, path: Path) -> bool:
        """A folder with a config and weights in safetensors."""
        return (path / "config.json").is_file() and any(path.glob("*.safetensors"))

    def build(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        folder: Path,
        dynamic: bool = True,
        cache: bool = False,
    ) -> Path:
        """Save the model; torch takes every shape, with a cache or without, so the other arguments change nothing."""
        model.save_pretrained(folder)
        return folder

    def open(self, path: Path, target: Target) -> TorchSession:
        """Load the class that the config names."""
        import torch
        import transformers

        if target.device == "cuda" and not torch.cuda.is_available():
            raise TargetError(f"{path}: device 'cuda' asked, torch finds no GPU; expected device: cpu")
        names = json.loads((path / "config.json").read_text()).get("architectures") or ["none"]
        architecture = getattr(transformers, names[0], None)
        if architecture is None:
            raise TargetError(f"{path}/config.json: architectures names '{names[0]}'; expected a transformers class")
        return TorchSession(architecture.from_pretrained(path, dtype=getattr(torch, target.dtype)), target)


def cache_argument(model: PreTrainedModel) -> str:
    """The name that a decoder's key-value cache has among its arguments and outputs: another from transformers 5.24 on.

    That of the older versions stands for it where the model takes none.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def uncached(model: PreTrainedModel) -> dict[str, bool]:
    """The argument that keeps a decoder from returning its key-value cache, for models that have one."""
    return {"use_cache": False} if getattr(model.config.get_text_config(), "use_cache", None) is not None else {}
