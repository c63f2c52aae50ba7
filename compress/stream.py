"""A residual stream that is narrower than the config says.

A stock config can't always tell the width of a sliced stream: many families derive the size of a head from the hidden
size. There the config keeps the hidden size that heads are made from, and the record says what is left of it:
``stream`` is the width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from compress.declared import declare_
from compress.layout import Layout
from compress.record import record_of
from compress.uniform import HIDDEN, spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def width_of(config: Any) -> int:
    """The width of the residual stream."""
    return record_of(config).get("stream", config.hidden_size)


def narrow_stream_(model: PreTrainedModel, layout: Layout, width: int) -> None:
    """Reshape the modules of a model without weights to a stream of `width`, in place."""
    for name, found in spans(model, layout).items():
        path, _, entry = name.rpartition(".")
        module = model.get_submodule(path)
        for span in found:
            if span.name == HIDDEN:
                held = getattr(module, entry)
                setattr(module, entry, nn.Parameter(held.detach().narrow(span.dim, 0, width), held.requires_grad))
                declare_(module)
