"""A transformers model folder that plain `from_pretrained` loads, with a model card that tells what was done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from compress.errors import ExportError
from exporters.base import Exporter, outputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.state import State


class HuggingFace(Exporter):
    """Weights in safetensors, config, tokenizer and README.md; what is read back equals the model bit for bit."""

    kind: ClassVar[str] = "huggingface"
    as_stored: ClassVar[bool] = True

    @property
    def folder(self) -> str:
        """Where in a run's output it lies."""
        return "model"

    def write(self, state: State, folder: Path, card: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Save, load with plain `from_pretrained`, and compare weights and outputs."""
        from compress import checkpoint

        checkpoint.save(state.model, folder, state.tokenizer)
        (folder / "README.md").write_text(model_card(state, card), encoding="utf-8")
        _compare(state.model, folder, state)
        return 0.0, {}


def model_card(state: State, card: Mapping[str, Any]) -> str:
    """README.md of a model: front matter, how to load it, the steps that made it and its figures."""
    name = str(state.dense.source or "a dense model")
    name = Path(name).name if Path(name).exists() else name  # where it lay on the maker's disk tells readers nothing
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": state.task.name,
        "tags": ["hf-compress", "pruned"],
    }
    if "/" in name:
        front["base_model"] = name
    head = yaml.safe_dump(front, sort_keys=False)
    kind = type(state.model).__name__
    parts = [
        f"---\n{head}---\n\n# {name}, compressed\n",
        "Made with hf-compress, which cuts heads, columns and layers until a measured speed-up is met.\n",
        "## Use\n\nIts layers have different widths, which `import compress` teaches transformers to load.\n",
        f"```python\nimport compress\nfrom transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("path/to/this/folder")\n```\n',
    ]
    if steps := [{row["pass"]: row.get("options") or {}} for row in card.get("steps", ())]:
        parts.append(f"## Plan\n\n```yaml\n{yaml.safe_dump({'passes': steps}, sort_keys=False)}```\n")
    told = ("promised_speedup", "measured_speedup", "parameters", "bytes")
    rows = {key: card[key] for key in told if card.get(key) is not None}
    rows |= {metric: value for metric, value in (card.get("quality") or {}).items() if isinstance(value, int | float)}
    if rows:
        lines = [f"| {key.replace('_', ' ')} | {value:,.4g} |" if isinstance(value, float) else
                 f"| {key.replace('_', ' ')} | {value:,} |" for key, value in rows.items()]  # fmt: skip
        parts.append("\n".join(["## Figures\n", "| | |", "|---|---:|", *lines, ""]))
    return "\n".join(parts)


def _compare(model: PreTrainedModel, folder: Path, state: State) -> None:
    """Raise ExportError unless the folder gives the same weights and the same outputs."""
    import torch

    from compress.runtimes import example_inputs

    attention = model.config._attn_implementation
    loaded: Any = type(model).from_pretrained(folder, attn_implementation=attention)
    loaded.to(model.device)
    weights, met = model.state_dict(), loaded.state_dict()
    wrong = sorted(weights.keys() ^ met.keys()) or [n for n, w in weights.items() if not torch.equal(w, met[n])]
    inputs = example_inputs(model, state.tokenizer, 2, 16)
    outputs = outputs_of(loaded, inputs)
    wrong = wrong or [n for n, value in outputs_of(model, inputs).items() if not torch.equal(value, outputs[n])]
    if wrong:
        raise ExportError(f"huggingface: '{wrong[0]}' reads back otherwise than it was; expected the same bits")
