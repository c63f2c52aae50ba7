"""Narrows the residual stream and every other width alike, so that a plain, smaller config tells the whole model.

The hidden width shows at every norm, embedding and projection, the head's included, and the denominators of norms
change with it: a cut channel is not silence. So nothing is mended in place. A stock model of the smaller config is
filled with the rows and columns that stay, and what comes out loads wherever transformers is.

Where the stream lies isn't written down for each family: a stock model twice as wide, built without memory, tells it by
which dimensions of its parameters have doubled, beside those that the layout's axes account for.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from compress.errors import LayoutError
from compress.layout import Axis, Layout, Site, stored_dim
from compress.record import ORIGINS, record_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN = "hidden"  # the name of the residual stream, beside those of axes
FOLLOWERS = ("embedding_size", "word_embed_proj_dim")  # entries that go with the hidden size where they equal it


@dataclass(frozen=True)
class Span:
    """Dimension `dim` of a stored parameter follows the width `name`, of which it has `sites`, none for the stream."""

    dim: int
    name: str
    sites: tuple[Site, ...] = ()

    @property
    def width(self) -> int:
        """Places along the dimension for each unit."""
        return sum(site.width for site in self.sites) or 1


Spans = Mapping[str, Sequence[Span]]  # by parameter


def narrow(model: PreTrainedModel, layout: Layout, keep: Mapping[str, Sequence[int]]) -> PreTrainedModel:
    """Give a new model with only the units `keep` of some axes and, under ``hidden``, channels of the residual stream.

    Axes that one entry of the config tells must keep as many units each. The model given stays as it was; the new one
    is on its device and in its mode. What a family scales by its hidden size (Gemma its embeddings, T5 its tied logits)
    follows the new size. Raises LayoutError where no stock config tells the sizes.
    """
    units = {name: axis.units for name, axis in layout.axes.items()} | {HIDDEN: model.config.hidden_size}
    chosen = {name: sorted(set(keep.get(name, range(units[name])))) for name in units}
    for name, kept in chosen.items():
        if not kept or not 0 <= kept[0] <= kept[-1] < units[name]:
            raise LayoutError(f"'{name}' has units 0..{units[name] - 1}, asked to keep {kept}")
    config = resized(model, layout, {name: len(kept) for name, kept in chosen.items()})
    weights = dict(model.state_dict())
    for parameter, found in spans(model, layout).items():
        for span in found:
            held = torch.tensor(chosen[span.name])
            if span.sites:
                axis = layout.axes[span.name]
                held = torch.cat([axis.positions(site, chosen[span.name]) for site in span.sites]).sort().values
            weights[parameter] = weights[parameter].index_select(span.dim, held.to(weights[parameter].device))
    return filled(model, config, weights)


def resized(model: PreTrainedModel, layout: Layout, sizes: Mapping[str, int]) -> Any:
    """The config of the model with other sizes of some axes and, under ``hidden``, of the residual stream.

    Raises LayoutError where axes that one entry tells differ, or where transformers would refuse the config.
    """
    record = record_of(model.config)
    if record["sizes"]:
        raise LayoutError("this model has widths of its own in some blocks; expected one whose blocks are alike")
    if "stream" in record:
        raise LayoutError(f"the stream of this model was sliced to {record['stream']}; expected one that is whole")
    config, before = copy.deepcopy(model.config), model.config.hidden_size
    _become_plain(config)
    hidden = sizes.get(HIDDEN, before)
    for entry in ("hidden_size", *FOLLOWERS):
        if getattr(config, entry, None) == before:
            setattr(config, entry, hidden)
    entries: dict[str, int] = {}
    for axis in layout.axes.values():
        for entry, per_unit in axis.entries:
            value = per_unit * sizes.get(axis.name, axis.units)
            if entries.setdefault(entry, value) != value:
                raise LayoutError(f"'{axis.name}' asks for {entry} {value}, an axis before it for {entries[entry]}")
    heads = [axis for axis in layout.axes.values() if axis.kind == "heads"]
    if not tied_to_heads(model, layout):
        entries["head_dim"] = places(heads[0])  # most families derive it from the hidden size where it isn't told
    for axis in heads if tied_to_heads(model, layout) else ():
        count = entries[axis.entries[0][0]]
        if count * places(axis) != hidden:
            raise LayoutError(
                f"a hidden width of {hidden} with {count} heads of {places(axis)} places in '{axis.name}': this family "
                "has no entry for the size of a head; expected a hidden width of heads times places"
            )
    for entry, value in entries.items():
        setattr(config, entry, value)
    try:
        type(config).from_dict(config.to_dict())
    except (StrictDataclassError, ValueError) as error:
        raise LayoutError(f"transformers refuses these sizes: {str(error).splitlines()[-1].strip()}") from error
    return config


def drop(model: PreTrainedModel, layout: Layout, stack: str, keep: Sequence[int]) -> Layout:
    """Keep only the blocks `keep` of a stack, in place, and leave the config one that stock transformers reads."""
    layout = layout.drop(model, stack, keep)
    _become_plain(model.config)
    return layout


def places(axis: Axis) -> int:
    """Places in a head of an axis of heads."""
    return axis.readers[0].width // axis.entries[0][1]


def tied_to_heads(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether the hidden size is that of all heads together, for want of an entry that tells the size of a head."""
    named = {entry for axis in layout.axes.values() for entry, _ in axis.entries}
    return not hasattr(model.config, "head_dim") and "num_key_value_heads" not in named


def spans(model: PreTrainedModel, layout: Layout) -> Spans:
    """Where each width shows: for every parameter in the state dict the dimensions that follow a width.

    Raises LayoutError where a dimension follows the hidden size in some other way than being it.
    """
    hidden, doubled = model.config.hidden_size, {HIDDEN: 2 * model.config.hidden_size}
    sites: dict[str, dict[tuple[int, str], list[Site]]] = defaultdict(lambda: defaultdict(list))
    for axis in layout.axes.values():
        if axis.kind == "heads" and tied_to_heads(model, layout):
            doubled[axis.name] = 2 * axis.units
        for site in axis.sites:
            module = model.get_submodule(site.module)
            sites[f"{site.module}.weight"][stored_dim(module, site.dim), axis.name].append(site)
            if site.dim == 0 and getattr(module, "bias", None) is not None:
                sites[f"{site.module}.bias"][0, axis.name].append(site)
    with torch.device("meta"):
        wide = type(model)(resized(model, layout, doubled)).state_dict()
    found: dict[str, list[Span]] = {}
    for name, tensor in model.state_dict().items():
        here = found[name] = [Span(dim, axis, tuple(run)) for (dim, axis), run in sites[name].items()]
        explained = list(tensor.shape)
        for span in here:
            units = layout.axes[span.name].units
            explained[span.dim] += span.width * (doubled.get(span.name, units) - units)
        for dim, size in enumerate(wide[name].shape):
            if size != explained[dim]:
                if (explained[dim], size) != (hidden, 2 * hidden):
                    raise LayoutError(f"'{name}' grows from {tuple(tensor.shape)} to {tuple(wide[name].shape)} with it")
                here.append(Span(dim, HIDDEN))
    return found


def _become_plain(config: Any) -> None:
    """Turn a record that tells of blocks alone into an entry that transformers carries along and doesn't read."""
    if getattr(config, "quantization_config", None) is None:
        return
    if record_of(config) is not config.quantization_config:
        raise LayoutError("this model is already quantized; expected one that is not: narrow before quantizing")
    setattr(config, ORIGINS, record_of(config)["blocks"])
    del config.quantization_config


def filled(model: PreTrainedModel, config: Any, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The model that loads with this config and these weights, in other things like `model`."""
    words = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    loaded: Any = type(model).from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **words
    )
    made, told = loaded
    strange = sorted(told["missing_keys"]) + sorted(told["unexpected_keys"])
    if strange:
        raise LayoutError(f"narrowed, this model has other parameters than before, the first is {strange[0]}")
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    trained = {name: one.requires_grad for name, one in model.named_parameters(remove_duplicate=False)}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained[name])
    return made.to(model.device).train(model.training)
