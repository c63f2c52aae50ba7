"""Losses of hidden states, block by block: the student's after each block beside those of the block it once was.

Pure functions take one tensor (batch, sequence, hidden) a block and a mask (batch, sequence), true at real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Loss, Reads, Seen, Widths, cosines, real, unit

if TYPE_CHECKING:
    from torch import Tensor, nn

OFFICIAL_EPSILON = 2.0**-7  # one unit in the last place of bfloat16 at 1, as in the script of SquareHead
States = Sequence["Tensor"]


def square_head(student: States, teacher: States, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Squared error of each block's states over the mean square of the teacher's, summed over blocks.

    A student whose states are all zero has a loss of 1 a block. `epsilon` keeps the quotient finite; at
    OFFICIAL_EPSILON blocks with small states count for less. SquareHead, arXiv:2310.06927.
    """
    pairs = [(real(mine, mask), real(theirs, mask)) for mine, theirs in zip(student, teacher, strict=True)]
    return total((mine - goal).square().mean() / (goal.square().mean() + epsilon) for mine, goal in pairs)


def token_distance(student: States, teacher: States, mask: Tensor) -> Tensor:
    """Squared Euclidean distance of a token's states, averaged over real tokens and blocks. ZipLM, arXiv:2302.04089."""
    pairs = [(real(mine, mask), real(theirs, mask)) for mine, theirs in zip(student, teacher, strict=True)]
    return total((mine - theirs).square().sum(-1).mean() for mine, theirs in pairs) / len(pairs)


def cosine_distance(student: States, teacher: States, mask: Tensor) -> Tensor:
    """One minus the cosine of a token's states, averaged over real tokens, summed over blocks.

    Puzzle trains by it and the predictions, arXiv:2411.19146; Minitron found no better distance, arXiv:2407.14679.
    """
    pairs = [(real(mine, mask), real(theirs, mask)) for mine, theirs in zip(student, teacher, strict=True)]
    return total((1 - (unit(mine) * unit(theirs)).sum(-1)).mean() for mine, theirs in pairs)


def graph_distance(student: States, teacher: States, mask: Tensor) -> Tensor:
    """Squared difference of the cosines between the tokens of each text, averaged over pairs of real ones and blocks.

    The token relations of LLaVA-KD, arXiv:2410.16236; of any width, and blind to a turn of all states.
    """
    pairs = mask.sum(1).square().sum()
    found = []
    for both in zip(student, teacher, strict=True):
        mine, theirs = (cosines(one.float().masked_fill(~mask[..., None], 0.0)) for one in both)
        found.append((mine - theirs).square().sum() / pairs.clamp(min=1))
    return total(found) / len(found)


class StateLoss(Loss):
    """A loss of hidden states.

    With `last` only the states after so many last blocks are compared: at 1 the tail, whatever lies below (FoldGPT,
    arXiv:2407.00928). With `project` a map to the teacher's width is learned for each block; it starts as the one that
    puts the student's channels where they were in the teacher.
    """

    reads: ClassVar[Reads] = Reads.STATES

    last: int | None = Field(default=None, ge=1, description="how many of the last blocks; left out, all")
    project: bool = Field(default=False, description="whether to learn a map to the teacher's width, used in training")

    @property
    def same_width(self) -> bool:
        """States are subtracted channel by channel, unless a map comes between."""
        return not self.project

    def learned(self, widths: Widths) -> nn.Module | None:
        """One map a block."""
        from torch import nn

        if not self.project:
            return None
        return nn.ModuleList(projection(widths) for _ in range(min(widths.blocks, self.last or widths.blocks)))

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The distance of the states."""
        mine, theirs = (list(one.states)[-(self.last or 0) :] for one in (student, teacher))
        if own is not None:
            mine = [turn(one.float()) for turn, one in zip(own, mine, strict=True)]
        return self.distance(mine, theirs, student.mask)

    def distance(self, student: States, teacher: States, mask: Tensor) -> Tensor:
        """The loss of states of one width."""
        raise NotImplementedError


class Hidden(StateLoss):
    """States relative to the teacher's: SquareHead."""

    epsilon: float = Field(default=1e-8, gt=0, description="added to the mean square; the paper's script has 2**-7")

    def distance(self, student: States, teacher: States, mask: Tensor) -> Tensor:
        """The loss of states of one width."""
        return square_head(student, teacher, mask, self.epsilon)


class Tokens(StateLoss):
    """States by their squared distance: ZipLM's token loss."""

    def distance(self, student: States, teacher: States, mask: Tensor) -> Tensor:
        """The loss of states of one width."""
        return token_distance(student, teacher, mask)


class Cosine(StateLoss):
    """States by their direction."""

    def distance(self, student: States, teacher: States, mask: Tensor) -> Tensor:
        """The loss of states of one width."""
        return cosine_distance(student, teacher, mask)


class Graph(Loss):
    """How the tokens of a text lie to each other; of any width."""

    reads: ClassVar[Reads] = Reads.STATES

    last: int | None = Field(default=None, ge=1, description="how many of the last blocks; left out, all")

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The difference of the relations."""
        mine, theirs = (list(one.states)[-(self.last or 0) :] for one in (student, teacher))
        return graph_distance(mine, theirs, student.mask)


def projection(widths: Widths) -> nn.Module:
    """A linear map (student's width -> teacher's) that puts channels where they were; where unknown, in order."""
    import torch

    turn = torch.nn.Linear(widths.student, widths.teacher, bias=False)
    places = widths.kept or range(min(widths.student, widths.teacher))
    with torch.no_grad():
        turn.weight.zero_()
        turn.weight[list(places), list(range(len(places)))] = 1.0
    return turn


def total(losses: Any) -> Tensor:
    """The sum of the losses of one block or more."""
    first, *others = losses
    return sum(others, first)
