"""A residual stream that is narrower than the config says.

A stock config can't always tell the width of a sliced stream: many families derive the size of a head from the hidden
size. There the config keeps the hidden size that heads are made from, and the record says what is left of it:
``stream`` is the width, and ``shortcuts`` names, as in the base model, the blocks that end in a shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.declared import declare_
from compress.layout import Layout, prefix_of, record_of
from compress.shortcut import add_shortcut_
from compress.uniform import HIDDEN, spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def width_of(config: Any) -> int:
    """The width of the residual stream."""
    return record_of(config).get("stream", config.hidden_size)


def stream_entries(width: int, shortcuts: Sequence[str] = ()) -> dict[str, Any]:
    """What the record says of a stream; nothing of shortcuts where there are none."""
    return {"stream": width, **({"shortcuts": list(shortcuts)} if shortcuts else {})}


def narrow_stream_(model: PreTrainedModel, layout: Layout, width: int, shortcuts: Sequence[str] = ()) -> None:
    """Reshape the modules of a model without weights to a stream of `width`, in place, and give blocks shortcuts."""
    for name, found in spans(model, layout).items():
        path, _, entry = name.rpartition(".")
        module = model.get_submodule(path)
        for span in found:
            if span.name == HIDDEN:
                held = getattr(module, entry)
                setattr(module, entry, nn.Parameter(held.detach().narrow(span.dim, 0, width), held.requires_grad))
                declare_(module)
    for block in shortcuts:
        add_shortcut_(model.get_submodule(prefix_of(model) + block), width)
