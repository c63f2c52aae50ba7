"""A loss for few classes: each is split into subclasses by what the teacher's classifier reads and makes no use of.

Of two classes a prediction is one number, and a teacher can say little by it. What its classifier reads says more; the
directions that no class weight has a part in are of no consequence for the teacher's own prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from passes.distillation.losses.base import Loss, Reads, Sample, Seen, Widths, kl

if TYPE_CHECKING:
    from torch import Tensor, nn

LEAST = 1e-6  # a spread below which a direction is taken for none


class Lelp(Loss):
    """Subclasses of each class by the teacher's embedding, for few classes; LELP (Loo et al., arXiv:2409.20449).

    Of what the teacher's classifier reads of some training rows the part in the null space of the class weights is
    taken, and of each class the principal directions, as many as `subclasses`, turned at random so that they vary
    alike. The softmax of the coordinates splits the class, and the divergence is taken over all subclasses together.
    These steps are the paper's, as summaries tell them; that a row belongs to the classes by the teacher's
    probabilities and that coordinates are divided by their standard deviation and `temperature` is chosen here.

    The paper's student has a head of as many outputs as subclasses, and sums them when it is used. Here its classifier
    stays as it is, and a map learned beside it splits each class: the sum is the class's own probability whatever the
    map says, so that nothing is left to collapse and the map is thrown away.
    """

    reads: ClassVar[Reads] = Reads.PREDICTIONS | Reads.FEATURES
    tasks: ClassVar[tuple[str, ...]] = ("text-classification", "token-classification")

    subclasses: int = Field(default=8, ge=2, description="of each class; at most as many as directions are left")
    temperature: float = Field(default=1.0, gt=0, description="softens how a class is split")
    sample: int = Field(default=1024, ge=2, description="training rows that the directions are found in")

    def learned(self, widths: Widths) -> nn.Module:
        """The teacher's splits as buffers, and the student's map, which starts as theirs if it fits, else even."""
        import torch

        sample: Any = widths.sample
        weight, bias = splits(sample, self.subclasses, self.temperature)
        own = torch.nn.Module()
        own.register_buffer("weight", weight)
        own.register_buffer("bias", bias)
        own.student = student = torch.nn.Linear(widths.features, len(weight))
        if widths.features != weight.shape[1]:
            weight, bias = student.weight.new_zeros(student.weight.shape), bias * 0
        student.load_state_dict({"weight": weight, "bias": bias})
        return own

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The divergence of the subclasses, averaged over the rows; 0 where there are none."""
        q = subclass_logs(student.logits, own.student(student.read))
        p = subclass_logs(teacher.logits, teacher.read @ own.weight.T + own.bias)
        return kl(p, q).sum() / max(1, len(p))


def subclass_logs(logits: Tensor, parts: Tensor) -> Tensor:
    """Log-probabilities (rows, classes * n) of subclasses, which sum to those of the class: `parts` split it."""
    split = parts.unflatten(-1, (logits.shape[-1], -1)).log_softmax(-1)
    return (logits.log_softmax(-1)[..., None] + split).flatten(1)


def splits(sample: Sample, subclasses: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The map (classes * n, width), and its bias, from what a classifier reads to the coordinates of subclasses.

    n is `subclasses`, or as many as directions are left that are orthogonal to all class weights.
    """
    import torch

    rows, shares = sample.features.double(), sample.logits.double().softmax(-1)
    _, sizes, basis = torch.linalg.svd(sample.weight.double())
    free = basis[int((sizes > sizes.max() * 1e-6).sum()) :]
    count = min(subclasses, len(free))
    turn = torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(0)).to(rows)).Q
    weights, biases = [], []
    for share in shares.T:
        share = share / share.sum()
        centre = share @ rows
        apart = (rows - centre) @ free.T
        spread, directions = torch.linalg.eigh((apart * share[:, None]).T @ apart)
        spread, directions = spread[-count:].clamp(min=0), directions[:, -count:]
        weight = turn @ directions.T @ free / (temperature * spread.mean().sqrt().clamp(min=LEAST))
        weights.append(weight)
        biases.append(-weight @ centre)
    return torch.cat(weights).float(), torch.cat(biases).float()
