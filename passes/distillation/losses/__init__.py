"""What a student is told from its teacher by: one table of losses, readable without torch.

A new loss is one class and one line here; the laws in the tests then hold for it or name the mistake.
"""

from __future__ import annotations

from passes.distillation.losses.across import Alm, Uld
from passes.distillation.losses.attention import Attention, Directions, Relations
from passes.distillation.losses.base import Loss
from passes.distillation.losses.embeddings import (
    Angles,
    Contrastive,
    Distances,
    Embedding,
    Lead,
    Leaf,
    Mutual,
    Similarity,
)
from passes.distillation.losses.focused import DacKl, Top, TopKd
from passes.distillation.losses.logits import (
    Jsd,
    Logits,
    Pld,
    Reverse,
    Sinkhorn,
    Skew,
    SkewReverse,
    Taid,
    logit_kl,
)
from passes.distillation.losses.states import Cosine, Graph, Hidden, Tokens, square_head
from passes.distillation.losses.subclasses import Lelp
from passes.distillation.losses.tasks import Listwise, Margins, Task

LOSSES: dict[str, type[Loss]] = {
    cls.named or cls.__name__.lower(): cls
    for cls in (
        *(Hidden, Tokens, Cosine, Graph),
        *(Logits, Reverse, Jsd, Skew, SkewReverse, Taid, Sinkhorn, Pld),
        *(Top, TopKd, DacKl, Lelp),
        *(Uld, Alm),
        *(Embedding, Leaf, Contrastive, Mutual, Similarity, Distances, Angles, Lead),
        *(Attention, Relations, Directions),
        *(Margins, Listwise, Task),
    )
}

__all__ = ["LOSSES", "Loss", "logit_kl", "square_head"]
