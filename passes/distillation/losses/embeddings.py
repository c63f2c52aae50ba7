"""Losses of embeddings: what a batch of texts means, each by itself or to each other.

Pure functions take embeddings (batch, hidden), the last states averaged over real tokens. Those that compare relations
take any two widths; a batch of one has no relations and loses nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Loss, Reads, Seen, Widths, cosines, kl, pooled, unit
from passes.distillation.losses.states import projection, total

if TYPE_CHECKING:
    from torch import Tensor, nn


def embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of embeddings, averaged over the batch."""
    return (1 - (unit(student.float()) * unit(teacher.float())).sum(-1)).mean()


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the cosines between all pairs, averaged over the pairs.

    What a search or a clustering reads of embeddings; turning all of them alike changes nothing. Tung & Mori,
    arXiv:1907.09682, with cosines in place of normalised rows.
    """
    squares = (cosines(student.float()) - cosines(teacher.float())).square()
    return (squares.sum() - squares.diagonal().sum()) / max(1, len(student) * (len(student) - 1))


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the distances between all pairs, each over their mean; RKD, arXiv:1904.05068."""
    if len(student) < 2:
        return student.sum() * 0
    mine, theirs = (_distances(one.float()) for one in (student, teacher))
    return huber(mine - theirs).mean()


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosine at each corner of all triangles; RKD, arXiv:1904.05068. Memory is cubic in the batch."""
    count = len(student)
    if count < 3:
        return student.sum() * 0
    apart = student.new_ones(count, count).triu(1).bool() | student.new_ones(count, count).tril(-1).bool()
    triples = apart[:, :, None] & apart[:, None, :] & apart[None, :, :]  # corner, one end, other end
    mine, theirs = (cosines(one.float()[None, :] - one.float()[:, None]) for one in (student, teacher))
    return huber((mine - theirs)[triples]).mean()


def lead(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of how likely each text finds the others, ``softmax(cosine / temperature)`` over them, averaged over texts."""
    count = len(student)
    if count < 2:
        return student.sum() * 0
    itself = student.new_ones(count).diag().bool()
    mine, theirs = (
        cosines(one.float()).div(temperature).masked_fill(itself, -1e4).log_softmax(-1) for one in (student, teacher)
    )
    return kl(theirs, mine).mean()


def info_nce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How hard it is to tell a text's teacher embedding from the others' by the student's: cross-entropy of cosines."""
    return -_critic(student, teacher, temperature).log_softmax(-1).diagonal().mean()


def mutual_information(student: Tensor, teacher: Tensor, temperature: float, alpha: float) -> Tensor:
    """The lower bound I_alpha on the information that the embeddings have in common, estimated in the batch.

    ``1 + E[f(x, y) - log a(y)] - E[e^f(x', y) / a'(y)]`` with ``a(y) = alpha mean_x e^f(x, y) + 1 - alpha``, where x'
    are the other texts and a' knows them alone; the critic f is a cosine over the temperature. alpha = 1 is `info_nce`
    up to the logarithm of the batch, alpha near 0 the bound of Nguyen et al. Poole et al., arXiv:1905.06922.
    """
    count = len(student)
    if count < 2:
        return student.sum() * 0
    scores = _critic(teacher, student, temperature)  # row: the teacher's y, column: the student's x
    others = scores.masked_fill(scores.new_ones(count).diag().bool(), -1e4)
    rest = scores.new_tensor(1 - alpha).log()
    everyone, strangers = (one.logsumexp(-1) - math.log(size) for one, size in ((scores, count), (others, count - 1)))
    baseline, against = ((mean + math.log(alpha)).logaddexp(rest) for mean in (everyone, strangers))
    return 1 + (scores.diagonal() - baseline).mean() - (strangers - against).exp().mean()


class EmbeddingLoss(Loss):
    """A loss of embeddings; with `project` a map to the teacher's width is learned."""

    reads: ClassVar[Reads] = Reads.STATES

    project: bool = Field(default=False, description="whether to learn a map to the teacher's width, used in training")

    @property
    def same_width(self) -> bool:
        """Embeddings are compared channel by channel, unless a map comes between."""
        return not self.project

    @property
    def depth(self) -> int | None:
        """Embeddings are made of the last states."""
        return 1

    def learned(self, widths: Widths) -> nn.Module | None:
        """The map."""
        return projection(widths) if self.project else None

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The distance of the embeddings."""
        mine = student.embeddings
        return self.distance(mine if own is None else own(mine), teacher.embeddings)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of one width."""
        raise NotImplementedError


class Embedding(EmbeddingLoss):
    """Embeddings by their direction."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of one width."""
        return embedding_distance(student, teacher)


class Leaf(EmbeddingLoss):
    """Squared distance of normalised embeddings: a student in its teacher's space; LEAF (Vujanic & Rueckstiess, 2025).

    The paper's student keeps its map and can be searched with the teacher's embeddings. Here the map goes, so that
    holds without one.
    """

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of one width."""
        return (unit(student) - unit(teacher)).square().sum(-1).mean()


class Contrastive(EmbeddingLoss):
    """Each text's own teacher embedding told from the others' in the batch; CKD of DistilCSE, arXiv:2112.05638."""

    vanishes: ClassVar[bool] = False  # the other texts are never out of the question

    temperature: float = Field(default=0.05, gt=0, description="of the cosines")

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of one width."""
        return info_nce(student, teacher, self.temperature)


class Mutual(EmbeddingLoss):
    """Less the information that the embeddings have in common: MI-alpha of Distiller, arXiv:2109.11105."""

    vanishes: ClassVar[bool] = False  # minus a bound that is finite

    temperature: float = Field(default=0.05, gt=0, description="of the cosines")
    alpha: float = Field(default=0.5, gt=0, le=1, description="1 varies least, lower ones are less biased")

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of one width."""
        return -mutual_information(student, teacher, self.temperature, self.alpha)


class RelationLoss(Loss):
    """How the texts of a batch lie to each other; of any width."""

    reads: ClassVar[Reads] = Reads.STATES

    @property
    def depth(self) -> int | None:
        """Embeddings are made of the last states, unless a loss asks for more."""
        return getattr(self, "last", 1)

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The difference of the relations."""
        return self.distance(student.embeddings, teacher.embeddings)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of any two widths."""
        raise NotImplementedError


class Similarity(RelationLoss):
    """Cosines between the embeddings of a batch."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of any two widths."""
        return similarity_distance(student, teacher)


class Distances(RelationLoss):
    """Distances between the embeddings of a batch: RKD's first."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of any two widths."""
        return rkd_distance(student, teacher)


class Angles(RelationLoss):
    """Angles between the embeddings of a batch: RKD's second."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of any two widths."""
        return rkd_angle(student, teacher)


class Lead(RelationLoss):
    """What each text would find among the others, by the states after each block; LEAD, arXiv:2212.05225.

    The other texts of the batch stand for a query's passages, cosines for inner products.
    """

    last: int | None = Field(default=None, ge=1, description="how many of the last blocks; left out, all")
    temperature: float = Field(default=0.05, gt=0, description="of the cosines")

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The mean over the blocks."""
        pairs = list(zip(student.states, teacher.states, strict=True))[-(self.last or 0) :]
        mask = student.mask
        return total(self.distance(pooled(mine, mask), pooled(theirs, mask)) for mine, theirs in pairs) / len(pairs)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of embeddings of any two widths."""
        return lead(student, teacher, self.temperature)


def huber(difference: Tensor) -> Tensor:
    """Half the square up to 1, then a straight line."""
    size = difference.abs()
    return (size - 0.5).where(size > 1, 0.5 * size.square())


def _distances(vectors: Tensor) -> Tensor:
    """The Euclidean distances of all pairs over their mean: (pairs,)."""
    first, second = vectors.new_ones(len(vectors), len(vectors)).triu(1).nonzero().unbind(-1)
    distances = (vectors[first] - vectors[second]).square().sum(-1).clamp(min=1e-12).sqrt()
    return distances / distances.mean()


def _critic(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """The cosines of all embeddings with all others', over the temperature: (batch, batch)."""
    return unit(one.float()) @ unit(other.float()).T / temperature
