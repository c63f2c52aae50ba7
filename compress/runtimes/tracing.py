"""What every export by torch.export needs: inputs that don't mislead it, open dimensions, no cache, no chatter."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress.runtimes.examples import longest_sequence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DYNAMIC = {  # inputs by name: which of their dimensions stay open, and the name of each
    **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ("batch", "sequence")),
    **dict.fromkeys(("decoder_input_ids", "decoder_attention_mask"), ("batch", "decoder_sequence")),
    **dict.fromkeys(("pixel_values", "input_features"), ("batch",)),
}
LARGEST_BATCH = 4096
# What torch.export and the translation to ONNX raise for a model they can't take.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)


def widened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Repeat open dimensions of size 1: torch.export takes a 1 in its example for a constant."""
    wide = {}
    for name, value in inputs.items():
        names = DYNAMIC.get(name, ())
        wide[name] = value.repeat([2 if i < len(names) and size == 1 else 1 for i, size in enumerate(value.shape)])
    return wide


def dynamic_shapes(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Which dimensions of each input stay open, with name and bounds."""
    from torch.export import Dim

    length = longest_sequence(model)
    dims = {"batch": Dim("batch", min=1, max=LARGEST_BATCH)}
    for name in ("sequence", "decoder_sequence"):
        dims[name] = Dim(name, min=2, max=length)
    return {name: {i: dims[dim] for i, dim in enumerate(DYNAMIC.get(name, ()))} for name in inputs}


@contextlib.contextmanager
def uncached_config(model: PreTrainedModel) -> Iterator[None]:
    """Export without a key-value cache; the config is as it was afterwards."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    try:
        for config in cached:  # the stacks of an encoder-decoder have configs of their own
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' progress and version notes, which the user can do nothing about."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
