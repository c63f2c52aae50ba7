"""A model folder in the format of compressed-tensors, which vLLM runs: the codes of gptq's grid, 4 or 8 bits, packed.

The codes and scales are the very ones that gptq chose, so what is read back equals the model's weights bit for bit. The
grid must be symmetric: transformers (5.23) loads zeros of this format only where it makes all weights floats again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.contract import GRID, Fact
from compress.errors import ExportError
from exporters.base import Exporter
from exporters.compared import worst_error

if TYPE_CHECKING:
    from torch import Tensor

    from compress.state import State

FORMAT = "pack-quantized"
METHOD = "compressed-tensors"


class CompressedTensors(Exporter):
    """Weights of 4 or 8 bits in safetensors, config and tokenizer, for vLLM and for plain `from_pretrained`.

    All layers share one scheme: those whose grid is another, and those that are no Linear, stay in floats, and the
    report says so. The fast kernels of vLLM are for groups of 32, 64 or 128 inputs and for whole rows. `tolerance` is
    the largest error taken, relative to the largest magnitude of an output (or to 1).
    """

    kind: ClassVar[str] = "compressed_tensors"
    named: ClassVar[str] = "compressed_tensors"
    tolerance: float = Field(default=1e-3, gt=0)

    @property
    def precision(self) -> str:
        """The number format of its weights."""
        return "weight_only"

    @property
    def requires(self) -> frozenset[Fact]:
        """What it must be told of a model besides the model."""
        return frozenset({GRID})

    def write(self, state: State, folder: Path, card: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Write codes in the place of weights, load with transformers, and compare weights and outputs."""
        from compress.runtimes.torch import TorchSession
        from compress.target import Target

        model, grid = state.model, state.facts[GRID.name]
        if find_spec("compressed_tensors") is None:
            raise ExportError(
                f"{self.kind}: needs {METHOD}; expected it here: pip install 'hf-compress[compressed-tensors]'"
            )
        if getattr(model.config, "quantization_config", None) is not None:
            raise ExportError(
                f"{self.kind}: vLLM takes no layers of unlike widths, nor packed ones; expected a model that plain "
                "transformers loads"
            )
        if grid["bits"] not in (4, 8):
            raise ExportError(f"{self.kind}: vLLM takes weights of 4 or 8 bits; met a grid of {grid['bits']}")
        middle = 2 ** (grid["bits"] - 1)
        if not all(bool((grid[f"{name}.zero"] == middle).all()) for name in grid["layers"]):
            raise ExportError(f"{self.kind}: the grid has zeros of its own; expected gptq: {{symmetric: true}}")
        group, layers, skipped = _scheme(model, grid)
        weights = dict(model.state_dict())
        for name in layers:
            del weights[f"{name}.weight"]
            weights |= _entries(model.get_submodule(name), name, grid)
        model.save_pretrained(folder, state_dict=weights)
        _tell(model, folder, layers, grid["bits"], group)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(folder)
        _compare(model, folder)
        loaded = type(model).from_pretrained(folder)
        worst = worst_error(self.kind, state, TorchSession(loaded, Target()), self.tolerance)
        return worst, {"weight_bits": grid["bits"], "layers": len(layers), "skipped": skipped}


def _scheme(model: Any, grid: Mapping[str, Any]) -> tuple[int | None, list[str], dict[str, str]]:
    """How many inputs share a scale (None: a whole row), the layers of which that holds, and why others stay out."""
    from torch import nn

    skipped, met = {}, {}
    for name in grid["layers"]:
        module, group = model.get_submodule(name), grid["groups"][name]
        if not isinstance(module, nn.Linear):
            skipped[name] = f"it is a {type(module).__name__}; the format takes Linear"
        elif module.in_features % group:
            skipped[name] = f"{group} inputs share a scale, which doesn't divide its {module.in_features}"
        else:
            met[name] = None if group == module.in_features else group
    if not met:
        raise ExportError(f"compressed_tensors: no layer can be stored: {'; '.join(sorted(set(skipped.values())))}")
    shared = Counter(met.values()).most_common(1)[0][0]
    fit = [name for name in met if grid["groups"][name] == shared or met[name] == shared]
    others = dict.fromkeys(
        met.keys() - set(fit), f"its scales are for other groups than the {shared or 'rows'} of most"
    )
    return shared, fit, {**skipped, **others}


def _entries(module: Any, name: str, grid: Mapping[str, Any]) -> dict[str, Tensor]:
    """What stands for a weight (out, in): signed codes packed along the inputs, scales, and its shape."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weight, bits = module.weight.detach().float().cpu(), grid["bits"]
    scale = grid[f"{name}.scale"].cpu()
    codes = (weight / scale.repeat_interleave(grid["groups"][name], 1)).round()
    entries = {
        "packed": pack_to_int32(codes.to(torch.int8), bits),
        "scale": scale.to(module.weight.dtype),
        "shape": torch.tensor(weight.shape),
    }
    return {f"{name}.weight_{part}": tensor for part, tensor in entries.items()}


def _tell(model: Any, folder: Path, layers: list[str], bits: int, group: int | None) -> None:
    """Write to config.json how the weights are stored."""
    from torch import nn

    how = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    scheme = {"targets": ["Linear"], "weights": {**how, "group_size": group} if group else how}
    left = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name not in set(layers)]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": left,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _compare(model: Any, folder: Path) -> None:
    """Raise ExportError unless the weights that are read back are the model's, bit for bit."""
    import torch
    from transformers.utils.quantization_config import CompressedTensorsConfig

    from compress.runtimes.tracing import quiet

    with quiet():  # about options that only say how to load
        loaded = type(model).from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    weights, met = model.state_dict(), loaded.state_dict()
    wrong = [name for name, weight in weights.items() if name not in met or not torch.equal(weight.cpu(), met[name])]
    if wrong:
        raise ExportError(f"compressed_tensors: '{wrong[0]}' reads back otherwise than it was; expected the same bits")
