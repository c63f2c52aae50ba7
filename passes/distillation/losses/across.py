"""Losses of predictions between language models of unlike tokenizers, whose rows and classes don't correspond."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Loss, Reads, Seen, picked

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

SURE = 1e-9  # the least surprisal by which a likelihood stays below 1 in float32


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The L1 distance of sorted probabilities (rows, classes), the smaller vocabulary filled up with zeros: (rows,).

    Of all ways to pair the classes of both it is the least.
    """
    from torch.nn.functional import pad

    most = max(student.shape[-1], teacher.shape[-1])
    mine, theirs = (
        pad(one.softmax(-1).sort(-1, descending=True).values, (0, most - one.shape[-1])) for one in (student, teacher)
    )
    return (mine - theirs).abs().sum(-1)


def chunk_likelihoods(logits: Tensor, tokens: Tensor, chunks: Tensor) -> Tensor:
    """Log-likelihoods of chunks of text: (chunks,).

    `logits` (rows, classes) are predictions of the `tokens` (rows,), which are parts of the `chunks` (rows,), counted
    from 0.
    """
    logs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return logs.new_zeros(int(chunks.max()) + 1 if len(chunks) else 0).index_add(0, chunks, logs)


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The temperature times KL(p || q) of Bernoulli distributions, of log-likelihoods divided by it: any shape.

    It is the cross-entropy of the two less what the teacher's own is, so that gradients are the same and a twin has
    none. As the temperature grows it tends to ``b - a + a log(a / b)`` with a, b the surprisals of teacher and student.
    """
    a, b = (-one.div(temperature).clamp(max=-SURE) for one in (teacher, student))
    missed = [one.neg().expm1().neg() for one in (a, b)]
    return temperature * ((-a).exp() * (b - a) + missed[0] * (missed[0].log() - missed[1].log()))


class Uld(Loss):
    """The L1 distance of sorted probabilities, so that no class need correspond; ULD, Boizard et al., arXiv:2402.12030.

    Rows are paired by their number within a text, up to the shorter: the paper's own way, which fits tokenizers that
    cut alike. Where one cuts finer, later rows are compared with those of another place in the text.
    """

    reads: ClassVar[Reads] = Reads.PREDICTIONS
    across: ClassVar[bool] = True

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The mean over the pairs; 0 where there are none."""
        both: list[Any] = [student.counted, teacher.counted]
        shorter = both[0].sum(1).minimum(both[1].sum(1))[:, None]
        kept = [one & (one.cumsum(1) <= shorter) for one in both]
        pairs = zip((student, teacher), kept, strict=True)
        mine, theirs = (picked(one.predictions, rows).float() for one, rows in pairs)
        return sorted_distance(mine, theirs).sum() / max(1, len(mine))


class Alm(Loss):
    """How likely each chunk of text is, the smallest that both cut alike; ALM, Minixhofer et al., arXiv:2503.20083.

    A binary divergence of ``p ** (1 / temperature)`` and the same of q, times the temperature.
    """

    reads: ClassVar[Reads] = Reads.PREDICTIONS
    across: ClassVar[bool] = True

    temperature: float = Field(default=100.0, gt=0, description="softens likelihoods, which are near 0 of long chunks")

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The mean over the chunks; 0 where there are none."""
        mine, theirs = (self.likelihoods(one) for one in (student, teacher))
        return binary_divergence(mine, theirs, self.temperature).sum() / max(1, len(mine))

    def likelihoods(self, seen: Seen) -> Tensor:
        """The log-likelihoods of the chunks by one model: (chunks,)."""
        chunks: Any = seen.chunks
        known = chunks >= 0
        return chunk_likelihoods(picked(seen.predictions, known).float(), seen.tokens[known], chunks[known])
