"""Losses of attention: whom the tokens look at, by what the projections of queries, keys and values give.

They take any two widths: what is compared are distributions over the tokens of a text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Loss, Reads, Seen, kl

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple["Tensor", "Tensor"]


def relation_kl(student: Pair, teacher: Pair, mask: Tensor, causal: bool = False) -> Tensor:
    """KL(teacher || student) of the relations ``softmax(a b^T / sqrt(places))``, averaged over heads and real tokens.

    Each model gives two tensors a and b (batch, heads, sequence, places), their heads the same in number.
    """
    theirs, mine = (_relation(*pair, mask, causal) for pair in (teacher, student))
    rows = kl(theirs, mine).transpose(1, 2)[mask]
    return rows.sum() / max(1, rows.numel())


def relation_heads(vectors: Tensor, heads: int) -> Tensor:
    """The heads of (batch, heads, sequence, places) put side by side and split anew into so many."""
    return vectors.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)


class AttentionLoss(Loss):
    """A loss of the student's last attention that has heads left, beside one of the teacher's."""

    reads: ClassVar[Reads] = Reads.ATTENTION
    head_by_head: ClassVar[bool] = False

    block: int = Field(default=-1, description="the teacher's block; from the end where negative")


class Attention(AttentionLoss):
    """Queries with keys, and values with values, head by head: MiniLM, arXiv:2002.10957.

    Heads must be as many in both. What rotary positions or relative biases do to the scores is left out.
    """

    head_by_head: ClassVar[bool] = True

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The divergence of attention and of value relations."""
        mine, theirs = student.heads, teacher.heads
        # Under grouped queries several heads look by the same key.
        keys = [one.keys.repeat_interleave(one.queries.shape[1] // one.keys.shape[1], 1) for one in (mine, theirs)]
        pairs = [
            [(one.queries, key), (one.values, one.values)] for one, key in zip((mine, theirs), keys, strict=True)
        ]
        looks, values = zip(*pairs, strict=True)
        return relation_kl(*looks, student.mask, theirs.causal) + relation_kl(*values, student.mask)


class Relations(AttentionLoss):
    """Queries, keys and values, each with its like, in relation heads; MiniLMv2, arXiv:2012.15828.

    Heads are put side by side and split anew, so that their numbers may differ.
    """

    heads: int = Field(default=48, ge=1, description="relation heads at most; as many as divide all widths")

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The divergence of the three relations."""
        loss = 0.0
        for name in ("queries", "keys", "values"):
            mine, theirs = getattr(student.heads, name), getattr(teacher.heads, name)
            common = math.gcd(*(one.shape[1] * one.shape[3] for one in (mine, theirs)))
            heads = max(count for count in range(1, self.heads + 1) if common % count == 0)
            pairs = [(split, split) for split in (relation_heads(one, heads) for one in (mine, theirs))]
            loss = loss + relation_kl(*pairs, student.mask)
        return loss


def _relation(a: Tensor, b: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """Log-probabilities (batch, heads, sequence, sequence) with which tokens relate to the real ones."""
    a, b = (one.float().masked_fill(~mask[:, None, :, None], 0.0) for one in (a, b))
    seen = mask[:, None, None, :]
    if causal:
        seen = seen & mask.new_ones(mask.shape[1], mask.shape[1]).tril()
    return (a @ b.mT / math.sqrt(a.shape[-1])).masked_fill(~seen, -1e4).log_softmax(-1)
