"""Losses of predictions that look at a part of the teacher's distribution: its likeliest classes, or where it is dense.

What they leave out or make light of are the many classes that the teacher itself says little about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Widths, kl, unit
from passes.distillation.losses.logits import Divergence

if TYPE_CHECKING:
    from torch import Tensor, nn

POINTS = 16  # ranks 1, 2, 4, ... at which a distribution is read: the last is beyond most vocabularies
LEAST = 1e-7  # probability of all other classes
TINY = 1e-30  # a probability so small that its logarithm is still a number in float32


class Top(Divergence):
    """KL(p || q) over the teacher's `classes` likeliest and one class for all others: never above the full one.

    With `recalibrate` c both are ``softmax(probability / c)`` over those classes alone, which takes their confidence
    back; FIRST (Shum et al., arXiv:2408.12168).
    """

    classes: int = Field(default=5, ge=1, description="how many of the teacher's likeliest")
    recalibrate: float | None = Field(default=None, gt=0, description="softens their probabilities; left out, not")

    def rows(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence of each row: (rows,)."""
        top = p.topk(min(self.classes, p.shape[-1]), -1).indices
        p, q = p.gather(-1, top), q.gather(-1, top)
        if self.recalibrate:
            return kl(*(one.exp().div(self.recalibrate).log_softmax(-1) for one in (p, q)))
        return kl_with_rest(p, q, [1 - one.exp().sum(-1) for one in (p, q)])


class TopKd(Divergence):
    """Directions of logits, the teacher's likeliest raised, and each row told from the others; TopKD, arXiv:2508.04539.

    Logits z are counted from their mean. The teacher's `classes` highest become ``z (1 + scale (1 - rank / classes))``
    plus `lift` times how far they lie above the others; then highest, lowest and all other classes are compared by one
    minus a cosine each, weighed by `positive`, `negative` and 1. The product of rows, over the number of classes, tells
    by cross-entropy, both ways, which of the teacher's rows is the student's own. It follows the paper's idea, its
    formulas known from a summary alone: the three terms are as given there; how the factor falls with the rank, what
    the lift is measured by and the numbers are chosen here, and the teacher's choice stands for the label.

    Unlike `top` it drops no class and compares no probabilities: a cosine is blind to how sure the student is, and of
    two or three classes says nothing, so that there the rows alone teach. Its goal is more than the teacher.
    """

    named = "topkd"
    vanishes: ClassVar[bool] = False  # the goal is raised, and the other rows are never out of the question
    tasks: ClassVar[tuple[str, ...]] = ("text-classification", "token-classification", "fill-mask", "text-generation")

    classes: int = Field(default=5, ge=1, description="how many of the teacher's likeliest; half of all at most")
    scale: float = Field(default=0.5, ge=0, description="how much the likeliest is raised; the next ones by less")
    lift: float = Field(default=0.1, ge=0, description="what is added to them all, over their lead on the others")
    positive: float = Field(default=2.0, ge=0, description="what the direction of the highest logits counts")
    negative: float = Field(default=1.0, ge=0, description="what the direction of the lowest logits counts")
    contrast: float = Field(default=1.0, ge=0, description="what telling rows apart counts")
    most: int = Field(default=64, ge=2, description="rows at most that are told apart, evenly spread")

    @property
    def by_rows(self) -> bool:
        """Rows are told from one another."""
        return False

    def between(self, p: Tensor, q: Tensor, own: Any, share: float) -> Tensor:
        """The mean over the rows; 0 where there are none."""
        goal, mine = (one - one.mean(-1, keepdim=True) for one in (p, q))
        count = max(1, min(self.classes, p.shape[-1] // 2))
        top, bottom = (goal.topk(count, -1, largest=one).indices for one in (True, False))
        groups = [goal.new_zeros(goal.shape).scatter(-1, one, 1.0) for one in (top, bottom)]
        groups.append(1 - groups[0] - groups[1])
        raised = amplified(goal, top, self.scale, self.lift)
        every = max(1, -(-len(p) // self.most))
        told = told_apart(mine[::every], goal[::every])
        loss = self.contrast * told.sum() / max(1, len(told))
        for weight, group in zip((self.positive, self.negative, 1.0), groups, strict=True):
            if group.any():
                apart = 1 - (unit(mine * group) * unit(raised * group)).sum(-1)
                loss = loss + weight * apart.sum() / max(1, len(p))
        return loss


class DacKl(Divergence):
    """KL(p || q) where a small learned network finds the teacher's distribution dense; DAC-KL, arXiv:2407.10068.

    Of each row's classes, from the likeliest down, those between two quantiles of probability are kept, a class that a
    quantile falls into by its part inside, and all the rest is one class, as with `top`: scaled to sum to 1 without
    it, they would leave the student free to put its probability elsewhere. The network reads how much the likeliest 1,
    2, 4, ... classes hold together, and says how much to cut at either end; it is trained with the student, by the
    same loss. At least `mass` stays, or cutting all would always be the best; at 1 it is KL(p || q). A validation is
    by all of the distribution.

    It follows the paper's idea, a network that learns the two quantiles through the loss itself; that they are those of
    probability, the floor and what the network is are chosen here.
    """

    named = "dac_kl"

    mass: float = Field(default=0.5, gt=0, le=1, description="the least of the teacher's probability that is kept")

    @property
    def by_rows(self) -> bool:
        """Its network is trained by all rows."""
        return False

    def learned(self, widths: Widths) -> nn.Module:
        """The network, of the same weights at first in every run."""
        import torch
        from torch import nn

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(POINTS, POINTS), nn.Tanh(), nn.Linear(POINTS, 3))

    def between(self, p: Tensor, q: Tensor, own: Any, share: float) -> Tensor:
        """The mean over the rows; 0 where there are none."""
        import torch

        if own is None or not torch.is_grad_enabled():
            return super().between(p, q, own, share)
        p, order = p.sort(-1, descending=True)
        held = p.exp().cumsum(-1)
        ranks = (2 ** torch.arange(POINTS, device=p.device)).clamp(max=p.shape[-1]) - 1
        cuts = (1 - self.mass) * own(held[:, ranks]).softmax(-1)
        return clipped_kl(p, q.gather(-1, order), cuts[:, :1], 1 - cuts[:, 1:2]).sum() / max(1, len(p))


def amplified(logits: Tensor, top: Tensor, scale: float, lift: float) -> Tensor:
    """Logits (rows, classes) with the `top` (rows, k), from the highest down, times a factor and plus a lift."""
    count, others = top.shape[-1], logits.shape[-1] - top.shape[-1]
    high = logits.gather(-1, top)
    lead = high.mean(-1, keepdim=True) - (logits.sum(-1, keepdim=True) - high.sum(-1, keepdim=True)) / max(1, others)
    ranks = logits.new_ones(count).cumsum(0) - 1
    return logits.scatter(-1, top, high * (1 + scale * (1 - ranks / count)) + lift * lead)


def told_apart(student: Tensor, teacher: Tensor) -> Tensor:
    """How hard it is to tell a row's like in the other model by the product of logits, both ways averaged: (rows,)."""
    scores = student @ teacher.T / student.shape[-1]
    return -(scores.log_softmax(0).diagonal() + scores.log_softmax(1).diagonal()) / 2


def clipped_kl(p: Tensor, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """KL(p || q) between the quantiles `low` and `high` (rows, 1) of p, all that lies outside being one class: (rows,).

    Log-probabilities (rows, classes) stand in the order in which p is counted. Gradients go to q and to the quantiles.
    """
    whole = p.double().softmax(-1)  # in float32 a tail would be lost beside what stands before it
    upto = whole.cumsum(-1)
    inside = (upto.minimum(high) - (upto - whole).maximum(low)).clamp(min=0)
    kept = (inside / whole.clamp(min=TINY)).clamp(max=1).float()
    return kl_with_rest(p, q, [((1 - kept) * one.exp()).sum(-1) for one in (p, q)], kept)


def kl_with_rest(p: Tensor, q: Tensor, rest: Sequence[Tensor], kept: Tensor | float = 1.0) -> Tensor:
    """KL(p || q) of log-probabilities (rows, classes), each by its `kept` part, and one class of `rest` (rows,)."""
    ours, theirs = (one.clamp(min=LEAST) for one in rest)
    return (kept * p.exp() * (p - q)).sum(-1) + ours * (ours / theirs).log()
