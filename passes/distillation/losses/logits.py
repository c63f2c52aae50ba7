"""Losses of predictions: divergences between the teacher's distribution p and the student's q, row by row.

All take log-probabilities (rows, classes). A single class is a score and no distribution: whatever the divergence, its
squared difference is taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Loss, Reads, Seen, Widths, kl, rows_of
from passes.distillation.losses.predictions import Draws, Projected

if TYPE_CHECKING:
    from torch import Tensor, nn


def logit_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits (..., classes), averaged over rows, times the temperature squared.

    `mask` picks rows of (batch, sequence, classes). Hinton et al., arXiv:1503.02531.
    """
    return Logits(temperature=temperature).compare(rows_of(student, mask), rows_of(teacher, mask))


def most_to_gain(p: Tensor, q: Tensor, reference: Tensor | None, share: float) -> Tensor:
    """Which rows, a share of them, q can gain most in: by KL(p || q) beyond what the reference leaves; (kept,)."""
    gain = kl(p, q) if reference is None else kl(p, q) - kl(p, reference)
    return gain.topk(math.ceil(share * len(gain))).indices


class Divergence(Loss):
    """A divergence of the teacher's distribution p and the student's q, averaged over the rows that count.

    `keep` below 1 trains on that share of the rows alone, those with most to gain: where q is further from p than a
    reference is, a student that has learned already. Without one the teacher itself is taken for it. AdaSPEC (Hu et
    al., 2025) keeps the tokens that a small draft model can learn.
    """

    reads: ClassVar[Reads] = Reads.PREDICTIONS

    temperature: float = Field(default=1.0, gt=0, description="softens both distributions; multiplied on, squared")
    keep: float = Field(default=1.0, gt=0, le=1, description="share of the rows trained on, those with most to gain")

    @property
    def by_rows(self) -> bool:
        """Unless rows are chosen, each is looked at by itself."""
        return self.keep == 1

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The divergence of the predictions."""
        mine, theirs = student.logits, teacher.logits
        if isinstance(mine, Projected):
            from passes.distillation.chunked import summed

            loss = summed(lambda logits, goals: len(logits) * self.compare(logits, goals), mine, theirs)
            return loss / max(1, len(mine))
        reference = teacher.reference.logits if teacher.reference else None
        return self.compare(mine, theirs, reference, own, student.share)

    def compare(
        self, student: Tensor, teacher: Any, reference: Tensor | None = None, own: Any = None, share: float = 1.0
    ) -> Tensor:
        """The divergence of logits (rows, classes), or of a student's from the teacher's draws."""
        if student.shape[-1] == 1:
            return (student - teacher).square().mean()
        q = student.div(self.temperature).log_softmax(-1)
        if isinstance(teacher, Draws):
            return self.estimate(teacher, q).sum() / max(1, len(q)) * self.temperature**2
        p = teacher.div(self.temperature).log_softmax(-1)
        if self.keep < 1:
            known = None if reference is None else reference.div(self.temperature).log_softmax(-1)
            rows = most_to_gain(p, q.detach(), known, self.keep)
            p, q = p[rows], q[rows]
        return self.between(p, q, own, share) * self.temperature**2

    def between(self, p: Tensor, q: Tensor, own: Any, share: float) -> Tensor:
        """The mean over the rows; 0 where there are none."""
        return self.rows(p, q).sum() / max(1, len(p))

    def rows(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence of each row, KL(p || q) unless a loss says another: (rows,)."""
        return kl(p, q)

    def estimate(self, draws: Draws, q: Tensor) -> Tensor:
        """The divergence of each row, by tokens drawn from p: (rows,)."""
        raise NotImplementedError


class Expected(Divergence):
    """A divergence that is a mean over p, so that tokens drawn from p estimate it and its gradient without bias."""

    drawn: ClassVar[bool] = True

    def rows(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence of each row: (rows,)."""
        return (p.exp() * self.gap(p, q)).sum(-1)

    def estimate(self, draws: Draws, q: Tensor) -> Tensor:
        """The divergence of each row, by tokens drawn from p: (rows,)."""
        return (draws.weights * self.gap(draws.logs, q.gather(-1, draws.ids))).sum(-1)

    def gap(self, p: Tensor, q: Tensor) -> Tensor:
        """What is averaged, of log-probabilities of the same classes."""
        raise NotImplementedError


class Logits(Expected):
    """KL(p || q), averaged over the rows that count; Hinton et al., arXiv:1503.02531."""

    def gap(self, p: Tensor, q: Tensor) -> Tensor:
        """The difference."""
        return p - q


class Reverse(Divergence):
    """KL(q || p): leaves out what the student can't hold rather than covering all; MiniLLM, arXiv:2306.08543."""

    def rows(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence of each row: (rows,)."""
        return kl(q, p)


class Jsd(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; GKD, arXiv:2306.13649.

    Over beta it tends to KL(p || q) as beta falls to 0, over 1 - beta to KL(q || p) as it rises to 1.
    """

    beta: float = Field(default=0.5, gt=0, lt=1, description="the teacher's share of the mixture")

    def rows(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence of each row: (rows,)."""
        mixture = mixed(p, q, self.beta)
        return self.beta * kl(p, mixture) + (1 - self.beta) * kl(q, mixture)


class Skew(Expected):
    """KL(p || alpha p + (1 - alpha) q), never above -log(alpha); DistiLLM, arXiv:2402.03898."""

    alpha: float = Field(default=0.1, gt=0, lt=1, description="the teacher's share of what it is compared with")

    def gap(self, p: Tensor, q: Tensor) -> Tensor:
        """The difference from the mixture."""
        return p - mixed(p, q, self.alpha)


class SkewReverse(Divergence):
    """KL(q || alpha q + (1 - alpha) p), never above -log(alpha); DistiLLM, arXiv:2402.03898."""

    named = "skew_reverse"

    alpha: float = Field(default=0.1, gt=0, lt=1, description="the student's share of what it is compared with")

    def rows(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence of each row: (rows,)."""
        return kl(q, mixed(q, p, self.alpha))


class Taid(Divergence):
    """KL(r || q) with r between the two, ``softmax((1 - t) log q + t log p)``, q held still; arXiv:2501.16937.

    t rises from `start` to 1 with the run, and ahead of it while the loss falls. A validation compares with the
    teacher itself, t = 1, or the easiest goal would win.
    """

    start: float = Field(default=0.4, ge=0, lt=1, description="t at first")
    momentum: float = Field(default=0.99, ge=0, lt=1, description="of the relative fall of the loss")
    rise: float = Field(default=5e-4, ge=0, description="the most that t runs ahead in one batch")

    @property
    def by_rows(self) -> bool:
        """What t follows is the loss of all rows."""
        return False

    def learned(self, widths: Widths) -> nn.Module:
        """Buffers that keep count: t, the momentum and the loss before."""
        import torch

        count = torch.nn.Module()
        for name, value in (("t", self.start), ("fall", 0.0), ("before", math.inf)):
            count.register_buffer(name, torch.tensor(value))
        return count

    def between(self, p: Tensor, q: Tensor, own: Any, share: float) -> Tensor:
        """The mean over the rows; where gradients are taken, t goes on."""
        if own is None or not q.requires_grad:
            return super().between(p, q, own, share)
        loss = super().between(on_the_way(p, q.detach(), own.t.clone()), q, own, share)
        self.advance(own, loss.detach(), share)
        return loss

    def advance(self, own: Any, loss: Tensor, share: float) -> None:
        """Let t follow the loss, the first of which tells of no fall."""
        if own.before.isfinite():
            own.fall.mul_(self.momentum).add_((1 - self.momentum) * (own.before - loss) / own.before.clamp(min=1e-12))
            ahead = own.t + self.rise * own.fall.sigmoid() * (1 - own.t)
            own.t.copy_(ahead.clamp(min=self.start + (1 - self.start) * share, max=1.0))
        own.before.copy_(loss)


class Sinkhorn(Divergence):
    """What it costs to carry the rows of p to those of q: an entropic plan, costs being L1 distances; SinKD.

    Cui et al., arXiv:2402.17110. The cost is quadratic in the rows, so `most` of them are taken, evenly spread.
    """

    vanishes: ClassVar[bool] = False  # the plan spreads some mass over other rows

    temperature: float = Field(default=2.0, gt=0, description="softens both distributions; multiplied on, squared")
    entropy: float = Field(default=0.1, gt=0, description="how much the plan is spread")
    rounds: int = Field(default=20, ge=1, description="normalisations of rows and columns in turn")
    most: int = Field(default=64, ge=2, description="rows at most")

    @property
    def by_rows(self) -> bool:
        """Rows are carried to one another."""
        return False

    def between(self, p: Tensor, q: Tensor, own: Any, share: float) -> Tensor:
        """The cost of the plan, a row."""
        from torch import cdist

        every = max(1, -(-len(p) // self.most))
        cost = cdist(q[::every].exp(), p[::every].exp(), p=1)
        return (plan(cost, self.entropy, self.rounds) * cost).sum() / max(1, len(cost))


class Pld(Divergence):
    """The Plackett-Luce likelihood of the classes in the teacher's order, each choice weighed by p; arXiv:2506.12542.

    ``sum_k p_k (log sum_(l >= k) q_l - log q_k)``, classes from the likeliest down; the paper puts the label before
    them, for which the teacher's own choice stands here.
    """

    vanishes: ClassVar[bool] = False  # a likelihood

    def rows(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence of each row: (rows,)."""
        p, order = p.sort(-1, descending=True)
        q = q.gather(-1, order)
        return (p.exp() * (q.flip(-1).logcumsumexp(-1).flip(-1) - q)).sum(-1)


def mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Log-probabilities of a mixture that holds `share` of one and the rest of the other."""
    return (one + math.log(share)).logaddexp(other + math.log1p(-share))


def on_the_way(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """Log-probabilities on the way from q to p, mixed before the softmax."""
    return q.lerp(p, t).log_softmax(-1)


def plan(cost: Tensor, entropy: float, rounds: int) -> Tensor:
    """The doubly stochastic matrix near ``exp(-cost / entropy)`` (n, n), by Sinkhorn's normalisations in turn."""
    logs = -cost / entropy
    for _ in range(rounds):
        logs = logs.log_softmax(1)
        logs = logs.log_softmax(0)
    return logs.exp()
