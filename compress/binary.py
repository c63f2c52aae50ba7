"""Encoders whose weights and activations are one bit each: the modules, in training and as they are stored.

A matrix becomes ``scale * sign(W - mean(W))`` with a mean and a scale for each row, the scale being the mean magnitude
of what is left, which is nearest in squares. What is multiplied by it is first brought to codes: signs (BiBERT,
arXiv:2203.06390), or codes of a learned step and shift, 1 and 0 where no value is below zero (BiT, arXiv:2205.13016).
BiT takes one mean for a whole matrix; rows of their own serve both here.

In training a product is one of floats that happen to be whole numbers, exact up to 2^24; stored, bits are counted. Both
give the same number and what follows is the same arithmetic, so that both models give the same bits. Activations of
more bits are counted plane by plane where weights are read; where an attention multiplies them with one another they
stay floats.

Attention is transformers' own module with another function for its middle: of BiBERT, a token sees those whose score
isn't negative, all alike; of BiT, the softmax is brought to 1 and 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.bits import pack, unpack
from compress.codes import Elastic, Signs, binary, signs
from compress.errors import LayoutError
from compress.layout import Layout
from compress.record import own_record, record_of
from compress.sparse import gpu  # noqa: F401  # define the operators

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "hf_compress_binary"  # the name under which transformers finds the attention
Method = Literal["bibert", "bit"]


class BinaryLinear(nn.Linear):
    """A Linear that computes with the signs of its weights, which are trained; `read` gives the codes of its input."""

    read: Signs | Elastic

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        codes, step = self.read(x)
        sign, scale = binary(self.weight)
        return _finished(F.linear(codes, sign), scale * step, self.bias)


class PackedLinear(nn.Module):
    """A `BinaryLinear` stored: bits (out, bytes), scales (out,)."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None, read: Signs | Elastic) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.bits, self.scale = _empty(outputs, inputs)
        self.bias, self.read = bias, read

    @property
    def learned(self) -> int:
        """Weights and bias, as they were trained."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.bias.numel())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        codes, step = self.read(x)
        if _counts(x):
            rows, (low, high) = codes.reshape(-1, self.in_features), self.read.range
            whole = _signs(rows, self.bits) if low == -high else _whole(rows, self.bits, low, high)
            whole = whole.view(*x.shape[:-1], -1).to(x.dtype)
        else:
            whole = F.linear(codes, unpack(self.bits, self.in_features).to(codes.dtype))
        return _finished(whole, self.scale * step, self.bias)


class BinaryEmbedding(nn.Embedding):
    """A table that gives the signs of its rows, each with its scale."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., width)."""
        sign, scale = binary(super().forward(ids))
        return sign * scale[..., None]


class PackedEmbedding(nn.Module):
    """A `BinaryEmbedding` stored: bits (rows, bytes), scales (rows,)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, width
        self.bits, self.scale = _empty(rows, width)

    @property
    def learned(self) -> int:
        """Weights, as they were trained."""
        return self.num_embeddings * self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., width)."""
        scale = F.embedding(ids, self.scale[:, None])
        return unpack(self.bits[ids], self.embedding_dim).to(scale.dtype) * scale


class BinaryAttention(nn.Module):
    """The middle of an attention: codes of queries, keys and values, and whom each token sees.

    Without `weights` it sees those with a score that isn't negative; else those that the codes of the softmax say.
    """

    def __init__(self, queries: Signs | Elastic, keys: nn.Module, values: nn.Module, weights: nn.Module | None) -> None:
        super().__init__()
        self.queries, self.keys, self.values, self.weights = queries, keys, values, weights
        self.packed = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Each (batch, heads, sequence, places), `mask` what is added to scores; (batch, sequence, heads, places)."""
        (q, of_q), (k, of_k), (v, of_v) = self.queries(query), self.keys(key), self.values(value)
        counts = self.packed and self.queries.bits == 1 and _counts(query)
        whole = _signs(q, pack(k)).to(q.dtype) if counts else q @ k.mT
        scores = whole * (of_q * of_k * scaling)
        scores = scores if mask is None else scores + mask
        seen, step = (0.5 * (signs(scores) + 1), 1.0) if self.weights is None else self.weights(scores.softmax(-1))
        whole = _seen(seen, pack(v.mT)).to(v.dtype) if counts else seen @ v
        return (whole * (of_v * step)).transpose(1, 2).contiguous()


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The attention as transformers calls it."""
    return module.binary(query, key, value, attention_mask, scaling), None


def binarize_(model: PreTrainedModel, layout: Layout, method: Method, embeddings: bool, bits: int = 1) -> None:
    """Make the modules of all blocks binary, in place, and record it; weights are kept, to be trained.

    `embeddings` says whether the table of tokens becomes so too, `bits` how many activations have; norms, positions and
    heads stay as they are. Raises LayoutError where the model is no encoder, or its attention can't be another.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.activations import ACT2CLS
    from transformers.masking_utils import eager_mask

    refuse_unfit(model, layout)
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    activations: Any = tuple({kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()})
    elastic = method == "bit"
    feeding = {site.module for axis in layout.axes.values() if axis.kind == "columns" for site in axis.readers}
    for name, module in list(model.named_modules()):
        if not any(name.startswith(f"{stack}.") for stack in layout.stacks):
            continue
        if type(module) is nn.Linear:
            module.__class__ = BinaryLinear
            module.read = Elastic((module.in_features,), name in feeding) if elastic else Signs()
        elif elastic and isinstance(module, activations):
            model.set_submodule(name, nn.ReLU())
    for axis in layout.axes.values():
        if axis.kind == "heads" and axis.units:
            shape = (axis.units, 1, axis.sites[0].width)
            q, k, v = (Elastic(shape, False) if elastic else Signs() for _ in range(3))
            attention = BinaryAttention(q, k, v, weights=Elastic((), True) if elastic else None)
            model.get_submodule(axis.bypass[0][0]).add_module("binary", attention)
    if embeddings:
        model.get_input_embeddings().__class__ = BinaryEmbedding
    model.config._attn_implementation = ATTENTION
    own_record(model)["binary"] = {"method": method, "embeddings": embeddings}
    activate_(model, bits)


def activate_(model: PreTrainedModel, bits: int) -> None:
    """Let the activations of a binary model have so many bits, in place, and record it."""
    for module in model.modules():
        if isinstance(module, Elastic):
            module.bits = bits
    own_record(model)["binary"]["bits"] = bits


def pack_(model: PreTrainedModel) -> None:
    """Store the binary modules of a model packed, in place; of a model without weights, where they will lie."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BinaryLinear):
            shell: Any = PackedLinear(module.in_features, module.out_features, module.bias, module.read)
        elif isinstance(module, BinaryEmbedding):
            shell = PackedEmbedding(module.num_embeddings, module.embedding_dim)
        else:
            if isinstance(module, BinaryAttention):
                module.packed = True
            continue
        if module.weight.device.type != "meta":
            with torch.no_grad():
                sign, scale = binary(module.weight)
            shell.bits = nn.Parameter(pack(sign), requires_grad=False)
            shell.scale = nn.Parameter(scale, requires_grad=False)
        model.set_submodule(name, shell)


def refuse_unfit(model: PreTrainedModel, layout: Layout) -> None:
    """Raise LayoutError where the model can't be made binary."""
    record, kind = record_of(model.config), type(model).__name__
    if not layout.stacks or any(stack.caches for stack in layout.stacks.values()):
        raise LayoutError(f"{kind} writes text; expected an encoder such as BERT to be made binary")
    if not model._supports_attention_backend:
        raise LayoutError(f"{kind} computes its attention by itself; expected one that takes another function for it")
    if "binary" in record or record.get("shared") or record.get("cured"):
        why = "is binary already" if "binary" in record else "has blocks that share their matrices"
        raise LayoutError(f"{kind} {why}; expected a model that is neither")


def keeps_table(model: PreTrainedModel) -> str | None:
    """Why the table of tokens can't be made binary; None where it can."""
    table: Any = model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        return f"it is a {type(table).__name__}"
    head = model.get_output_embeddings()
    return "the head has the same matrix" if head is not None and head.weight is table.weight else None


def _finished(whole: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer gives, of the whole numbers that a product gave."""
    return whole * scale if bias is None else whole * scale + bias


def _signs(codes: Tensor, bits: Tensor) -> Tensor:
    """Signs (..., m, count) times signs in bits (..., n, bytes): (..., m, n)."""
    product: Tensor = torch.ops.hf_compress.signs_product(pack(codes), bits, codes.shape[-1])
    return product


def _seen(codes: Tensor, bits: Tensor) -> Tensor:
    """Ones and zeros (..., m, count) times signs in bits (..., n, bytes): (..., m, n)."""
    product: Tensor = torch.ops.hf_compress.seen_product(pack(codes), bits)
    return product


def _whole(codes: Tensor, bits: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers from `low` to `high` (m, count) times signs in bits (n, bytes): (m, n), plane by plane."""
    above = (codes - low).to(torch.uint8)
    planes = range((high - low).bit_length())
    found = sum((_seen(above >> plane & 1, bits) * 2**plane for plane in planes), start=torch.zeros(()))
    return found + low * _seen(torch.ones_like(codes[:1]), bits) if low else found


def _counts(x: Tensor) -> bool:
    """Whether bits can be counted here; on other devices, and in exports, which have no such node, they are floats."""
    return x.device.type in ("cpu", "cuda") and not torch.compiler.is_exporting()


def _empty(rows: int, width: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Room for bits and scales."""
    bits = torch.empty(rows, -(-width // 8), dtype=torch.uint8)
    return nn.Parameter(bits, requires_grad=False), nn.Parameter(torch.empty(rows), requires_grad=False)
