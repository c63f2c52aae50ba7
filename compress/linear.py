"""One Linear where an attention or a feed-forward layer stood: what a model pays for a layer that hardly mattered.

The modules of the axis go as they do with its last unit, and the Linear has the place and the name of the axis' reader.
It reads what entered the first of those modules. Where a block applies its activation between modules that go (OPT,
Whisper), what it reads has gone through the activation; across attention it reads the states that ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.constant import Constant
from compress.errors import LayoutError
from compress.layout import Layout
from compress.record import prefix_of, record_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linearise(model: PreTrainedModel, layout: Layout, name: str) -> Layout:
    """Put one Linear where an axis was, in place, and record it in the model's config.

    It starts at zero, so that until it is filled this equals cutting all units. Raises LayoutError where the axis has
    gone already, or can't go.
    """
    axis = layout.axis(name)
    if not axis.units:
        raise LayoutError(f"axis '{name}' has no units left; expected some for a linear layer to stand for")
    writer: Any = model.get_submodule(axis.sites[0].module)
    inputs = writer.nx if isinstance(writer, Conv1D) else writer.in_features
    layout = layout.cut(model, name, [])
    for site in axis.readers:
        constant: Any = model.get_submodule(site.module)
        model.set_submodule(site.module, _zero_linear(inputs, constant, writer.weight))
    record_of(model.config).setdefault("linear", []).append(name.removeprefix(prefix_of(model)))
    return layout


def _zero_linear(inputs: int, constant: Constant, like: Tensor) -> nn.Linear:
    """A Linear that gives what the constant gives, its weights zeros of the kind of `like`; it always has a bias."""
    linear = nn.Linear(inputs, constant.features, device="meta")  # first weights of its own would be thrown away
    bias = like.new_zeros(constant.features) if constant.bias is None else constant.bias.detach().clone()
    linear.weight = nn.Parameter(like.new_zeros(constant.features, inputs), requires_grad=like.requires_grad)
    linear.bias = nn.Parameter(bias, requires_grad=like.requires_grad)
    return linear
