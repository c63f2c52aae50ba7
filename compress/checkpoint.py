"""Saves and loads models whose widths differ from layer to layer, in the format of transformers itself.

The folder is what `save_pretrained` writes: safetensors and config.json, where the record of cuts stands under
``quantization_config``. After `import compress`, plain ``AutoModelForX.from_pretrained(folder)`` loads it.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import DataError, ExportError, LayoutError
from compress.families import FAMILIES, dense_layout
from compress.quantizer import register
from compress.record import RECORD
from compress.tasks import Task, find_model, first_line, infer_task

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)

register()


def save(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write model and tokenizer to `folder`, whole or not at all; a model that stood there is replaced.

    Raises ExportError where the folder can't be written, or holds something that is no model.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise ExportError(f"{folder} exists and is no model folder; give a new folder, or an empty one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            written = Path(beside, "written")
            # What transformers makes of a library's weights as it loads them it can't turn back: they stay as they are.
            model.save_pretrained(written, save_original_format=library_of(model) is None)
            for weights in written.glob("*.safetensors"):  # written for their owner alone, unlike all other files
                weights.chmod((written / "config.json").stat().st_mode)
            if tokenizer is not None:
                tokenizer.save_pretrained(written)
            if folder.exists():
                folder.rename(Path(beside, "replaced"))
            written.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder} can't be written: {first_line(error)}") from error


def load(source: str | Path, task: Task | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model, cut or dense, and its tokenizer where it has one; the task is read from config.json if not given.

    Raises DataError where there is no such model, LayoutError where its weights aren't those its config tells of.
    """
    folder = find_model(source)
    name = str(folder or source)
    if task is None:
        task = infer_task(AutoConfig.from_pretrained(name, local_files_only=folder is not None).to_dict())
    try:
        loaded: Any = task.load(source, output_loading_info=True)
    except SafetensorError as error:
        raise LayoutError(f"model: the weights in {source} can't be read: {first_line(error)}") from error
    model, info = loaded
    if model.config.model_type in FAMILIES:
        blocks = tuple(f"{stack}." for stack in dense_layout(model).stacks)
        missing = sorted(key for key in info["missing_keys"] if key.startswith(blocks))
        if missing:
            raise LayoutError(f"model: {source} lacks {len(missing)} weights of its blocks, the first is {missing[0]}")
    if folder is not None and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return model, None
    try:
        return model, AutoTokenizer.from_pretrained(name, local_files_only=folder is not None)
    except (OSError, ValueError) as error:
        raise DataError(f"model: the tokenizer in {source} can't be loaded: {first_line(error)}") from error


def library_of(model: PreTrainedModel) -> str | None:
    """The library whose own layers a model has for its linear ones; None where they are torch's or ours."""
    entry = getattr(model.config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return None if method in (None, RECORD) else str(getattr(method, "value", method))
