"""What a student is compared by: pure functions of tensors, all of them zero where student and teacher agree.

Hidden states are (batch, sequence, hidden), one tensor a block; masks are (batch, sequence) and true at real tokens.
All arithmetic is float32: the difference of two nearly equal states is lost in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OFFICIAL_EPSILON = 2.0**-7  # one unit in the last place of bfloat16 at 1, as in the script of the paper


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Squared error of each block's states over the mean square of the teacher's, summed over blocks.

    A student whose states are all zero has a loss of 1 a block. `epsilon` keeps the quotient finite; at
    OFFICIAL_EPSILON blocks with small states count for less. SquareHead, arXiv:2310.06927.
    """
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
        goal = _real(theirs, mask)
        losses.append(F.mse_loss(_real(mine, mask), goal) / (goal.square().mean() + epsilon))
    return torch.stack(losses).sum()


def token_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Squared Euclidean distance of a token's states, averaged over real tokens and blocks. ZipLM, arXiv:2302.04089."""
    losses = [
        (_real(mine, mask) - _real(theirs, mask)).square().sum(-1).mean()
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def logit_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits (..., classes), averaged over rows, times the temperature squared.

    `mask` picks rows of (batch, sequence, classes). A single logit is a score and no distribution: its squared
    difference is taken. Hinton et al., arXiv:1503.02531.
    """
    mine, theirs = (one.float().flatten(0, -2) if mask is None else _real(one, mask) for one in (student, teacher))
    if mine.shape[-1] == 1:
        return F.mse_loss(mine, theirs)
    log_q, log_p = F.log_softmax(mine / temperature, -1), F.log_softmax(theirs / temperature, -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2 / max(1, len(mine))


def embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of embeddings (batch, hidden), averaged over the batch."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared differences of the cosines between the embeddings (batch, any width) of a batch, averaged over pairs.

    A batch of one has no pairs and no loss. After Tung & Mori, "Similarity-preserving distillation", arXiv:1907.09682.
    """
    mine, theirs = (F.normalize(one.float(), dim=-1) for one in (student, teacher))
    pairs = max(1, len(mine) * (len(mine) - 1))
    return (mine @ mine.T - theirs @ theirs.T).square().sum() / pairs  # the diagonal is 0


LOSSES: dict[str, Callable[..., Tensor]] = {
    "hidden": square_head,
    "tokens": token_distance,
    "logits": logit_kl,
    "embedding": embedding_distance,
    "similarity": similarity_distance,
}


def _real(states: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens; (batch, sequence, any) -> (tokens, any)."""
    return states.flatten(0, 1).index_select(0, mask.flatten().nonzero().flatten()).float()
