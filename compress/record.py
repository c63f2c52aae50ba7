"""The record of what was changed in a model, in its config: what is needed to build it before weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import LayoutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "hf_compress"  # the quantization method under which transformers finds the record in config.json
VERSION = 1  # of the record
ORIGINS = "dense_blocks"  # entry of a plain config, without a record, that holds the record's `blocks`


def prefix_of(model: PreTrainedModel) -> str:
    """Where the base model lies in a task's model, with a dot, or the empty string in a base model.

    The record leaves the prefix out, so that a model saved under one task loads under another.
    """
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def record_of(config: Any) -> dict[str, Any]:
    """The record of cuts in a config: sizes of the cut axes and, per stack, the original index of each block.

    `linear`, where there is one, names the axes for which a Linear stands; `compress.stream` tells of a `stream`, and
    `compress.binary` of what is `binary`, `compress.lowbit` of what is `lowbit`, `compress.sparse` of what is `sparse`.
    """
    entry = getattr(config, "quantization_config", None)
    entry = entry if isinstance(entry, dict) or entry is None else entry.to_dict()  # an object while a model is loaded
    return entry if entry and entry.get("quant_method") == RECORD else _blank(config)


def _blank(config: Any) -> dict[str, Any]:
    """A record without cuts; a narrowed model remembers the origins of its blocks."""
    return {"sizes": {}, "blocks": dict(getattr(config, ORIGINS, None) or {})}


def own_record(model: PreTrainedModel) -> dict[str, Any]:
    """The record of a model, made in its config where it has none, there to be written to."""
    if getattr(model.config, "quantization_config", None) is None:
        model.config.quantization_config = {"quant_method": RECORD, "version": VERSION, **_blank(model.config)}
    entry = model.config.quantization_config
    if not isinstance(entry, dict) or entry.get("quant_method") != RECORD:
        method = entry["quant_method"] if isinstance(entry, dict) else entry.quant_method
        raise LayoutError(f"this model is already quantized ({method}); cut and drop before quantizing")
    return entry
