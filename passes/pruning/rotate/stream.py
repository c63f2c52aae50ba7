"""Where the residual stream of a pre-norm model shows: its norms, the layers that read them, and all that writes to it.

Nothing of that is written down for the families. Which parameters have the width of the stream, `compress.uniform`
tells; which norm a layer reads is seen in one call of the model, by what each norm gives. The stream may be turned
where it is only added to and read through norms, so anything else that is met is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import LayoutError
from compress.layout import Layout, stored_dim
from compress.record import record_of
from compress.uniform import HIDDEN, spans
from passes.uses import LINEAR, uses_of

EXPECTED = "expected a pre-norm model, whose stream is only added to, and read by linear layers through norms"


@dataclass(frozen=True)
class Stream:
    """The parameters along a residual stream, by name.

    `norms` are the modules in the order in which they run; `readers` the weights that read it, each with the norm
    between; `writers` all that adds to it, each with the stored dimension that lies along the stream. `centred` says
    that the norms take off the mean.
    """

    norms: tuple[str, ...]
    readers: Mapping[str, str]
    writers: Mapping[str, int]
    centred: bool


def stream_of(model: PreTrainedModel, layout: Layout, batch: Mapping[str, Tensor]) -> Stream:
    """Find the stream of a model, which is run on `batch` once; LayoutError where it can't be turned."""
    if folded := record_of(model.config).keys() & {"shared", "cured"}:
        raise LayoutError(f"slice_hidden: met {' and '.join(sorted(folded))} blocks; expected this step before fold")
    along = {
        name: dims
        for name, found in spans(model, layout).items()
        if (dims := [span.dim for span in found if span.name == HIDDEN])
    }
    weights = model.state_dict()
    norms = {name.removesuffix(".weight") for name in along if name.endswith(".weight") and weights[name].ndim == 1}
    uses, outputs = uses_of(model, norms, batch)
    for norm, what in uses.others.items():
        raise LayoutError(f"slice_hidden: what '{norm}' gives goes into {what}; {EXPECTED}")
    if unread := sorted(norms - set(uses.readers.values())):
        raise LayoutError(f"slice_hidden: no linear layer reads '{unread[0]}'; {EXPECTED}")
    writers = dict[str, int]()
    for name, dims in along.items():
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        reads = isinstance(module, LINEAR) and weights[name].ndim == 2 and stored_dim(module, 1) in dims
        if len(dims) > 1 or (reads and name not in uses.readers):
            raise LayoutError(
                f"slice_hidden: '{name}' reads what no norm gave, or writes as much as it reads; {EXPECTED}"
            )
        if not reads and owner not in norms:
            writers[name] = dims[0]
    for output in outputs:
        if given := uses.norm_of(output):
            raise LayoutError(f"slice_hidden: what '{given}' gives is an output of the model; expected one with a head")
    centred = all(isinstance(model.get_submodule(norm), nn.LayerNorm) for norm in norms)
    return Stream(tuple(uses.norms), uses.readers, writers, centred)
