"""Matrices of one or two bits a weight, in training and as they are stored; activations stay floats.

`ternary` has codes -1, 0 and 1 with a scale for each row, its mean magnitude: ``clip(round(w / scale), -1, 1)`` (Ma et
al., "The Era of 1-bit LLMs", arXiv:2402.17764, equations 1 to 3, which take one scale for a whole matrix; rows of their
own cost next to nothing). `onebit` has signs with two vectors, ``y = ((x * inner) sign(W)^T) * outer`` (Xu et al.,
"OneBit", arXiv:2402.11295, equation 3), which begin as the best that rank 1 can do for the magnitudes. The norm that
OneBit puts after each product is left out: without it a model begins as the nearest to the dense one.

Codes are whole numbers as floats, stored as planes of bits: signs one plane, ternary codes one for 1 and one for -1.
Stored and trained, the very same product is computed, so that both give the same bits. What is gained is size: each
call makes floats of the codes again. Signs alone have a kernel on NVIDIA GPUs that reads the bits themselves; it is for
sixteen-bit numbers, sums in float32 and rounds once, so there both are equal but for rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.bits import pack, unpack
from compress.codes import signs, through
from compress.errors import LayoutError
from compress.layout import Layout
from compress.record import own_record, record_of
from compress.sparse.gpu import HALVES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["ternary", "onebit"]
PLANES = {"ternary": 2, "onebit": 1}  # bits a weight
SMALLEST = 1e-8  # scale
ROUNDS = 50  # of the power iteration; entries above zero leave the largest singular value far from the next


class CodedLinear(nn.Linear):
    """A Linear that computes with the codes of its weights, which are trained."""

    method: Method
    inner: nn.Parameter | None
    outer: nn.Parameter | None

    def coded(self) -> tuple[Tensor, Tensor]:
        """Codes (out, in), through which gradients pass, and what each row counts (out,)."""
        return ternary(self.weight) if self.outer is None else (signs(self.weight), self.outer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return product(x, *self.coded(), self.inner, self.bias)


class StoredLinear(nn.Module):
    """A `CodedLinear` stored: bits (planes, out, bytes), `outer` (out,) and, of signs, `inner` (in,)."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None, method: Method) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        bits = torch.empty(PLANES[method], outputs, -(-inputs // 8), dtype=torch.uint8)
        self.bits = nn.Parameter(bits, requires_grad=False)
        self.outer = nn.Parameter(torch.empty(outputs), requires_grad=False)
        self.inner = nn.Parameter(torch.empty(inputs), requires_grad=False) if method == "onebit" else None
        self.bias = bias

    @property
    def learned(self) -> int:
        """Weights, bias and, of signs, the two vectors, as they were trained."""
        vectors = [] if self.inner is None else [self.inner, self.outer]
        beside = [*vectors, *([] if self.bias is None else [self.bias])]
        return self.in_features * self.out_features + sum(one.numel() for one in beside)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.inner is not None and _reads_bits(x):
            bits = self.bits.squeeze(0)
            signed: Tensor = torch.ops.hf_compress.signs_linear(x * self.inner, bits, self.outer, self.bias)
            return signed
        return product(x, unpacked(self.bits, self.in_features).to(x.dtype), self.outer, self.inner, self.bias)


def product(x: Tensor, codes: Tensor, outer: Tensor, inner: Tensor | None, bias: Tensor | None) -> Tensor:
    """``((x * inner) codes^T) * outer + bias``; codes (out, in)."""
    whole = F.linear(x if inner is None else x * inner, codes) * outer
    return whole if bias is None else whole + bias


def _reads_bits(x: Tensor) -> bool:
    """Whether the kernel that reads bits may multiply x; it has no gradient and no node in exports."""
    return x.is_cuda and x.dtype in HALVES and not x.requires_grad and not torch.compiler.is_exporting()


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out,) of a matrix; the gradient passes as if it had not been rounded."""
    scale = weight.detach().abs().mean(1).clamp(min=SMALLEST)
    steps = weight / scale[:, None]
    return through(steps.detach().round().clamp(-1, 1), steps), scale


def svid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors (out,) and (in,), none negative, whose product is nearest in squares to the magnitudes of a matrix.

    They are of equal norm. With the signs they are as near to the matrix itself (OneBit, proposition 1).
    """
    magnitudes = weight.detach().abs().double()
    inner = magnitudes.sum(0)
    for _ in range(ROUNDS):
        outer = F.normalize(magnitudes @ inner, dim=0)
        inner = F.normalize(magnitudes.T @ outer, dim=0)
    root = (outer @ magnitudes @ inner).sqrt()
    return (outer * root).to(weight.dtype), (inner * root).to(weight.dtype)


def packed(codes: Tensor, method: Method) -> Tensor:
    """The planes (planes, out, bytes) of codes (out, in)."""
    return torch.stack([pack(codes), pack(-codes)]) if method == "ternary" else pack(codes)[None]


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The codes (out, in) of planes, in float32."""
    above = unpack(bits[0], count)
    return above if len(bits) == 1 else (above - unpack(bits[1], count)) / 2


def lowbit_(model: PreTrainedModel, layout: Layout, method: Method) -> dict[str, str]:
    """Let the linear layers of all blocks compute with codes, in place, and record it; weights are kept, to be trained.

    Embeddings, norms and heads stay as they are. Returns the layers of blocks that do too, with the reason. Raises
    LayoutError where no layer can, the model has been made of few bits, or its blocks share matrices.
    """
    record, kind = record_of(model.config), type(model).__name__
    wrong = [name for name in ("binary", "lowbit", "shared", "cured") if record.get(name)]
    if wrong:
        raise LayoutError(f"{kind} is {wrong[0]} already; expected a model whose matrices are floats and its own")
    found, skipped = dict[str, Any](), {}
    if model._keep_in_fp32_modules:  # T5 reads the weights of its layers, when it runs and when it is loaded
        raise LayoutError(f"{kind} looks into its layers, for floats; expected a model that only calls them")
    for name, module in model.named_modules():
        if any(name.startswith(f"{stack}.") for stack in layout.stacks):
            if type(module) is nn.Linear:
                found[name] = module
            elif isinstance(module, nn.Linear | Conv1D):
                skipped[name] = f"it is a {type(module).__name__}; codes are for Linear"
    if not found:
        raise LayoutError(f"{kind} has no Linear in its blocks; expected some to make of few bits")
    for layer in found.values():
        layer.__class__, layer.method, layer.inner, layer.outer = CodedLinear, method, None, None
        if method == "onebit":
            weight = layer.weight
            known = (weight.new_empty(weight.shape[0]), weight.new_empty(weight.shape[1]))
            outer, inner = known if weight.is_meta else svid(weight)
            layer.outer, layer.inner = nn.Parameter(outer), nn.Parameter(inner)
    own_record(model)["lowbit"] = {"method": method}
    return skipped


def store_(model: PreTrainedModel) -> None:
    """Store the coded layers of a model in bits, in place; of a model without weights, where they will lie."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, CodedLinear):
            continue
        shell = StoredLinear(module.in_features, module.out_features, module.bias, module.method)
        if not module.weight.is_meta:
            with torch.no_grad():
                codes, outer = module.coded()
            shell.bits = nn.Parameter(packed(codes, module.method), requires_grad=False)
            shell.outer = nn.Parameter(outer.detach(), requires_grad=False)
            if module.inner is not None:
                shell.inner = nn.Parameter(module.inner.detach(), requires_grad=False)
        model.set_submodule(name, shell)
