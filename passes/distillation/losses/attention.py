"""Losses of attention: whom the tokens look at, by what the projections of queries, keys and values give.

They take any two widths: what is compared are distributions over the tokens of a text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Heads, Loss, Reads, Seen, kl
from passes.distillation.losses.states import total

if TYPE_CHECKING:
    from torch import Tensor


def relation(a: Tensor, b: Tensor, mask: Tensor, causal: bool = False) -> Tensor:
    """Log-probabilities ``log softmax(a b^T / sqrt(places))`` with which tokens relate to the real ones.

    `a` and `b` are (batch, heads, sequence, places), the result is (batch, heads, sequence, sequence).
    """
    a, b = (one.float().masked_fill(~mask[:, None, :, None], 0.0) for one in (a, b))
    seen = mask[:, None, None, :]
    if causal:
        seen = seen & mask.new_ones(mask.shape[1], mask.shape[1]).tril()
    return (a @ b.mT / math.sqrt(a.shape[-1])).masked_fill(~seen, -1e4).log_softmax(-1)


def relation_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of relations, as many heads in both, averaged over heads and real tokens."""
    rows = kl(teacher, student).transpose(1, 2)[mask]
    return rows.sum() / max(1, rows.numel())


def attention(heads: Heads, mask: Tensor) -> Tensor:
    """Log-probabilities of the attention of each head; under grouped queries several look by the same key."""
    keys = heads.keys.repeat_interleave(heads.queries.shape[1] // heads.keys.shape[1], 1)
    return relation(heads.queries, keys, mask, heads.causal)


def likeness(vectors: Tensor, mask: Tensor) -> Tensor:
    """The direction of ``x x^T``, (batch, heads, sequence, sequence): its length over the whole batch is 1."""
    real = vectors.float().masked_fill(~mask[:, None, :, None], 0.0)
    products = real @ real.mT
    return products / products.norm().clamp(min=1e-12)


def relation_heads(vectors: Tensor, heads: int) -> Tensor:
    """The heads of (batch, heads, sequence, places) put side by side and split anew into so many."""
    return vectors.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)


class AttentionLoss(Loss):
    """A loss of attention; `of` sees one at a time. Head by head, there must be as many in both models."""

    reads: ClassVar[Reads] = Reads.ATTENTION
    head_by_head: ClassVar[bool] = False
    each_block: ClassVar[bool] = False


class LastAttention(AttentionLoss):
    """A loss of the student's last attention that has heads left, beside one of the teacher's."""

    block: int = Field(default=-1, description="the teacher's block; from the end where negative")


class Attention(LastAttention):
    """Queries with keys, and values with values, head by head: MiniLM, arXiv:2002.10957.

    Heads must be as many in both. What rotary positions or relative biases do to the scores is left out.
    """

    head_by_head: ClassVar[bool] = True

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The divergence of attention and of value relations."""
        mask, both = student.mask, (student.heads, teacher.heads)
        mine, theirs = (attention(heads, mask) for heads in both)
        my_values, their_values = (relation(heads.values, heads.values, mask) for heads in both)
        return relation_kl(mine, theirs, mask) + relation_kl(my_values, their_values, mask)


class Directions(AttentionLoss):
    """How alike queries, keys and values each are among themselves, head by head: BiBERT, arXiv:2203.06390.

    Only the direction of those products counts, not their size: a scale of all queries, say, is no difference. Every
    block is compared with the one it was, and the losses are summed. As published it is a distance, not its square.
    """

    vanishes: ClassVar[bool] = False
    head_by_head: ClassVar[bool] = True
    each_block: ClassVar[bool] = True

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The distances of the three directions in one block."""
        losses = []
        for name in ("queries", "keys", "values"):
            mine, theirs = (likeness(getattr(seen.heads, name), student.mask) for seen in (student, teacher))
            losses.append((mine - theirs).norm())
        return total(losses)


class Relations(LastAttention):
    """Queries, keys and values, each with its like, in relation heads; MiniLMv2, arXiv:2012.15828.

    Heads are put side by side and split anew, so that their numbers may differ.
    """

    heads: int = Field(default=48, ge=1, description="relation heads at most; as many as divide all widths")

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The divergence of the three relations."""
        losses = []
        for name in ("queries", "keys", "values"):
            both = [getattr(seen.heads, name) for seen in (student, teacher)]
            width = math.gcd(*(one.shape[1] * one.shape[3] for one in both))
            heads = max(count for count in range(1, self.heads + 1) if width % count == 0)
            split = [relation_heads(one, heads) for one in both]
            mine, theirs = (relation(one, one, student.mask) for one in split)
            losses.append(relation_kl(mine, theirs, student.mask))
        return total(losses)
