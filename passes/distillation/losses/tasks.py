"""Losses of a task: its labels, and the scores that a ranker gives to candidates, which a batch stands for.

A batch is one list of candidates; what models score more than one class or token rank its rows by each class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Loss, Reads, Seen, kl

if TYPE_CHECKING:
    from torch import Tensor


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the margins between all pairs of scores (rows, classes), averaged over pairs and classes.

    Blind to a constant on all scores. Hofstätter et al., arXiv:2010.02666, where pairs are a positive and a negative.
    """
    shift = student - teacher
    return 2 * (shift - shift.mean(0)).square().sum(0).mean() / max(1, len(shift) - 1)


def listwise_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of which row is the best, by a softmax of its scores (rows, classes), mean over classes.

    ListNet's top-one distributions (Cao et al., 2007).
    """
    theirs, mine = (one.div(temperature).log_softmax(0).T for one in (teacher, student))
    return kl(theirs, mine).mean() * temperature**2


class Margins(Loss):
    """Margins between the scores of a batch: Margin-MSE."""

    reads: ClassVar[Reads] = Reads.PREDICTIONS

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The difference of the margins."""
        return margin_mse(student.logits, teacher.logits)


class Listwise(Loss):
    """Which of a batch is the best: a divergence over the list."""

    reads: ClassVar[Reads] = Reads.PREDICTIONS

    temperature: float = Field(default=1.0, gt=0, description="softens both distributions; multiplied on, squared")

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The divergence of the lists."""
        return listwise_kl(student.logits, teacher.logits, self.temperature)


class Task(Loss):
    """The model's own loss on the labels."""

    reads: ClassVar[Reads] = Reads.LABELS
    vanishes: ClassVar[bool] = False  # the teacher errs too

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The loss that the student gave."""
        return student.loss
