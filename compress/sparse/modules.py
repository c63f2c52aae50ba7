"""Linear layers that hold their matrix packed, and the models that have them: packed in place, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import ExportError, LayoutError
from compress.record import own_record, prefix_of
from compress.sparse import gpu, ops  # noqa: F401  # define the operators
from compress.sparse.bsr import Bsr
from compress.sparse.formats import Bitmap, Blocks
from compress.sparse.semi import SemiInt4

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Stored = Bitmap | Blocks | Bsr | SemiInt4  # formats that a layer can hold
FORMATS: dict[str, type[Stored]] = {"bitmap": Bitmap, "blocks": Blocks, "bsr": Bsr, "semi_int4": SemiInt4}
UNTOLD = {"bsr"}  # formats whose tensors don't tell how many outputs there are
HALVES = {"bitmap": "values", "bsr": "tiles", "semi_int4": "scale"}  # tensors that may be of sixteen-bit numbers
DOMAIN = "hf_compress"  # of the nodes in an ONNX graph that stand for packed layers
NODES = {"bitmap": f"{DOMAIN}::BitmapSparseLinear", "blocks": f"{DOMAIN}::BlockSparseLinear"}


class SparseLinear(nn.Module):
    """A linear layer whose matrix is packed; its tensors have the names that the format gives them.

    Sixteen-bit values are stored as whole numbers of the same bits, so that casting the model doesn't widen them.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: Stored, bias: Tensor | None) -> None:
        super().__init__()
        self.as_node = False
        self.out_features, self.in_features = packed.shape
        self.format = packed.name
        for name, held in packed.tensors().items():
            stored = held.view(torch.int16) if held.dtype == torch.bfloat16 else held
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """No weight: T5 asks a layer's for its type, GPT-2 fills it before a model is loaded."""
        return torch.empty(0)

    def tensors(self) -> list[Tensor]:
        """What the format stores, in its order."""
        held = {name: one for name, one in self.named_parameters(recurse=False) if name != "bias"}
        halves = HALVES.get(self.format)
        return [
            one.view(torch.bfloat16) if name == halves and one.dtype == torch.int16 else one
            for name, one in held.items()
        ]

    @property
    def learned(self) -> int:
        """Weights that aren't zero, and the bias."""
        kept = int((self.packed().unpack() != 0).sum())
        return kept if self.bias is None else kept + self.bias.numel()

    def packed(self) -> Stored:
        """The matrix."""
        return FORMATS[self.format]((self.out_features, self.in_features), *self.tensors())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.as_node:
            held = [one for name, one in self.named_parameters(recurse=False)]  # the bias last, if there is one
            shape = (*x.shape[:-1], self.out_features)
            return torch.onnx.ops.symbolic(
                NODES[self.format], (x, *held), {"inputs": self.in_features}, dtype=x.dtype, shape=shape, version=1
            )
        product = getattr(torch.ops.hf_compress, f"{self.format}_linear")
        outputs = (self.out_features,) if self.format in UNTOLD else ()
        return product(x, *self.tensors(), *outputs, self.bias)

    def extra_repr(self) -> str:
        """As a Linear tells of itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


@contextmanager
def as_nodes(model: nn.Module) -> Iterator[bool]:
    """Inside, packed layers export to ONNX as nodes that our library computes; says whether there are any.

    Raises ExportError where a format has no such node.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if lacking := {layer.format for layer in layers} - NODES.keys():
        raise ExportError(f"layers packed as {min(lacking)} can't be in ONNX; expected {' or '.join(NODES)}")
    try:
        for layer in layers:
            layer.as_node = True
        yield bool(layers)
    finally:
        for layer in layers:
            layer.as_node = False


def pack_(model: PreTrainedModel, packed: Mapping[str, Stored]) -> None:
    """Put packed layers in the place of linear ones, by name, in place, and record them in the model's config."""
    if not packed:
        return
    record = own_record(model).setdefault("sparse", {})
    for name, matrix in packed.items():
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, SparseLinear(matrix, layer.bias).to(layer.weight.device))
        record[name.removeprefix(prefix_of(model))] = matrix.record()


def hollow_(model: PreTrainedModel, sparse: Mapping[str, Mapping[str, Any]]) -> None:
    """Put packed layers without content where the record tells of some, for their tensors to be loaded into."""
    prefix = prefix_of(model)
    for name, told in sparse.items():
        layer: Any = model.get_submodule(prefix + name)
        kind = FORMATS.get(told.get("format", ""))
        if kind is None:
            raise LayoutError(f"{name} is packed as {told.get('format')}; expected one of {', '.join(FORMATS)}")
        shape = (told["outputs"], told["inputs"])
        side = {"side": told["side"]} if "side" in told else {}
        hollow: Any = kind.hollow(shape, told["entries"], getattr(torch, told["values"]), **side)
        model.set_submodule(prefix + name, SparseLinear(hollow, layer.bias))
    own_record(model)["sparse"] = {name: dict(told) for name, told in sparse.items()}


def refuse_broken(model: nn.Module) -> None:
    """Raise LayoutError where a packed layer's indices point outside of it: kernels follow them unasked."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) and (problem := module.packed().problem()):
            raise LayoutError(f"{name}: {problem}")
