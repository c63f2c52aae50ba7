"""Decoders with a key-value cache as one ONNX graph, which takes a prompt as well as each token that follows.

    input_ids (batch, sequence), attention_mask (batch, past_sequence + sequence), position_ids (batch, sequence),
    past_key_values.N.key and .value (batch, heads, past_sequence, head)
        -> logits (batch, sequence, vocabulary), present.N.key and .value (batch, heads, past_sequence + sequence, head)

The length of the past may be 0; N is the layer, which has a number of heads of its own, or no cache where it has lost
all of them. Caches hold the whole past, also of layers that see a window of it: the window is in the mask.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ExportError
from compress.runtimes.torch import cache_argument

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxruntime import InferenceSession
    from torch import Tensor
    from transformers import PreTrainedModel

PAST, PRESENT = "past_key_values", "present"
LEAF = re.compile(r"(?:(?:input|output)\.)?(?:past_key_values|cache)\.layers\.(\d+)\.(key|value)s")


def midway(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The call in the middle of a text that the graph is traced from: half of `inputs` lies in the cache already.

    Raises ExportError for a model that keeps no cache.
    """
    import torch
    from transformers import DynamicCache

    taken, kept = inspect.signature(model.forward).parameters, cache_argument(model)
    if kept not in taken or model.config.is_encoder_decoder or not model.can_generate():
        raise ExportError(f"onnx: {type(model).__name__} generates no text with a cache; expected cache: false")
    ids, cache = inputs["input_ids"], DynamicCache()
    past = ids.shape[1] // 2
    with torch.no_grad():
        model(input_ids=ids[:, :past], use_cache=True, **{kept: cache})
    given: dict[str, Any] = {"input_ids": ids[:, past:], "attention_mask": torch.ones_like(ids)}
    if "position_ids" in taken:
        given["position_ids"] = torch.arange(past, ids.shape[1]).repeat(len(ids), 1)
    return {**given, kept: cache, "use_cache": True}


def open_dimensions(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Which dimensions of `midway` stay open: batch and lengths of all tensors, those of the cache among them."""
    from torch.export import Dim
    from torch.utils import _pytree as pytree
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    register_cache_pytrees_for_model(model)
    texts = [name for name in given if name.endswith(("ids", "mask"))]
    kept = cache_argument(model)
    past = [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in pytree.tree_leaves(given[kept])]
    return {**{name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in texts}, kept: past}


def name_cache(graph: ir.Graph) -> dict[str, tuple[str, ...]]:
    """Give the cache's inputs and outputs their usual names, and return the dimensions of all inputs by name."""
    for values, prefix in ((graph.inputs, PAST), (graph.outputs, PRESENT)):
        for value in values:
            if found := LEAF.fullmatch(value.name or ""):
                value.name = f"{prefix}.{found[1]}.{found[2]}"
    dimensions: dict[str, tuple[str, ...]] = {
        value.name or "": ("batch", "heads", "past_sequence", "head") for value in graph.inputs
    }
    tokens = ("batch", "sequence")
    return {**dimensions, "input_ids": tokens, "position_ids": tokens, "attention_mask": ("batch", "total_sequence")}


def without_past(inputs: Sequence[Any], given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a call that begins a text may leave out: the positions of tokens (batch, sequence) and an empty cache.

    `inputs` are the graph's, as ONNX Runtime describes them. Masked tokens before a text take no position.
    """
    mask = np.asarray(given["attention_mask"])
    begun = {"position_ids": (mask.cumsum(axis=1) - 1).clip(min=0)}
    for value in inputs:
        if value.name.startswith(PAST):
            _, heads, _, head = value.shape
            begun[value.name] = np.zeros((len(mask), heads, 0, head), dtype=np.float32)
    return begun


def generate(session: InferenceSession, prompt: np.ndarray, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Follow prompts (batch, sequence) by the `count` likeliest tokens (batch, count), chosen one by one.

    Also returned are the logits (batch, vocabulary) that each was chosen by. Caches stay in ONNX Runtime's memory.
    """
    from onnxruntime import OrtValue

    names, inputs = [output.name for output in session.get_outputs()], session.get_inputs()
    taken = {value.name for value in inputs}
    new = {"input_ids": prompt.astype(np.int64), "attention_mask": np.ones_like(prompt, dtype=np.int64)}
    new |= without_past(inputs, new)
    cache: dict[str, Any] = {}
    tokens, logits = [], []
    for length in range(prompt.shape[1], prompt.shape[1] + count):
        feed = {name: OrtValue.ortvalue_from_numpy(value) for name, value in new.items() if name in taken}
        outputs = dict(zip(names, session.run_with_ort_values(names, {**feed, **cache}), strict=True))
        cache = {name.replace(PRESENT, PAST): value for name, value in outputs.items() if name.startswith(PRESENT)}
        logits.append(outputs["logits"].numpy()[:, -1])
        tokens.append(logits[-1].argmax(axis=-1)[:, None])
        mask = np.ones((len(prompt), length + 1), dtype=np.int64)
        new = {"input_ids": tokens[-1], "attention_mask": mask, "position_ids": mask[:, :1] * length}
    return np.concatenate(tokens, axis=1), logits
