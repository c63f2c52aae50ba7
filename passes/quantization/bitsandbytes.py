"""Bitsandbytes: the linear layers in 4 or 8 bits as the library of that name stores and multiplies them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.contract import Part, Pass
from compress.errors import CompressError, LayoutError

if TYPE_CHECKING:
    from compress.state import State


class Bitsandbytes(Pass):
    """Store the linear layers as bitsandbytes does; plain `from_pretrained` loads the result where that is installed.

    `nf4` has 16 values where normal weights are dense, a scale for each 64 of them (Dettmers et al., "QLoRA", 2023,
    section 3); `int8` a scale for each row, and takes the columns of activations that reach `threshold` out of the
    product (Dettmers et al., "LLM.int8()", 2022). Heads and embeddings stay floats, and only transformers runs the
    result: other exports refuse it. A model with layers of unlike widths can't be stored so.
    """

    touches: ClassVar[Part] = Part.VALUES | Part.FORMAT

    method: Literal["nf4", "int8"] = "nf4"
    double: bool = Field(default=False, description="nf4: whether the scales are quantized as well")
    threshold: float = Field(default=6.0, ge=0, description="int8: magnitude of activations that stay floats; 0: none")

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with a model that the library made; figures tell sizes, and what stayed in floats."""
        import torch
        from torch import nn
        from transformers import BitsAndBytesConfig
        from transformers.pytorch_utils import Conv1D

        from compress import checkpoint
        from compress.families import layout_of
        from compress.memory import stored_bytes

        if find_spec("bitsandbytes") is None:
            raise CompressError("bitsandbytes is missing; expected it here: pip install 'hf-compress[bitsandbytes]'")
        if getattr(state.model.config, "quantization_config", None) is not None:
            raise LayoutError("bitsandbytes: config.json has room for one record; expected a model that was not cut")
        how: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": self.threshold}
        if self.method == "nf4":
            how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": self.double}
            how |= {"bnb_4bit_compute_dtype": torch.float32}
        whole, device = state.workshop.step / "whole", state.model.device
        size = stored_bytes(state.model)
        checkpoint.save(state.model, whole)
        config, kind = BitsAndBytesConfig(**how), type(state.model)
        state.model = kind.from_pretrained(whole, dtype="float32", quantization_config=config, device_map={"": device})
        state.layout = layout_of(state.model)
        left = [name for name, one in state.model.named_modules() if type(one) in (nn.Linear, Conv1D)]
        state.figures = {
            "stored_bytes": {"before": size, "after": stored_bytes(state.model)},
            "skipped": dict.fromkeys(left, "bitsandbytes leaves heads in floats"),
        }
        yield state
