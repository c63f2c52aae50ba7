"""What every loss is: options with a weight, and one method from what two models show on a batch to a number.

The losses are read with a plan, before torch is there, so their arithmetic is written in methods of tensors. It is
float32 throughout: the difference of two nearly equal states is lost in bfloat16.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer, model_validator

from compress.contract import Options
from passes.distillation.losses.predictions import Draws, Projected, picked

if TYPE_CHECKING:
    from torch import Tensor, nn


class Reads(enum.Flag):
    """What a loss needs of the models; what no loss reads is not computed."""

    STATES = enum.auto()
    PREDICTIONS = enum.auto()
    ATTENTION = enum.auto()
    LABELS = enum.auto()
    FEATURES = enum.auto()


@dataclass(frozen=True)
class Heads:
    """What an attention projects, before rotary positions are put in: each (batch, heads, sequence, places).

    `causal` says that a token sees none after it.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    causal: bool = False


@dataclass(frozen=True)
class Seen:
    """What one model shows on a batch.

    `mask` (batch, sequence) is true at real tokens; `states` are (batch, sequence, hidden), one tensor a block that is
    compared; `predictions` are (..., classes), `counted` says which rows of them count, all where None; `heads` are
    those of one attention; `features` (..., width) are what the classifier read for each of the predictions; `loss` is
    the model's own on the labels. Of a language model `tokens` (batch, sequence) are those predicted, and `chunks`
    (batch, sequence) the number of the chunk of text, the same in both models, that each is a part of, -1 where of
    none. Beside a teacher may stand a `reference`, a student that has learned already. `share` is that of the training
    run that is done.

    Predictions may also be `Projected`, and a teacher's `Draws`, for losses that say that they take them.
    """

    mask: Tensor
    states: Sequence[Tensor] = ()
    predictions: Any = None  # without a type of its own, as what a loss reads is there
    counted: Tensor | None = None
    heads: Any = None
    tokens: Any = None
    chunks: Any = None
    features: Any = None
    loss: Any = None
    reference: Seen | None = None
    share: float = 1.0

    @cached_property
    def logits(self) -> Any:
        """The predictions that count: (rows, classes)."""
        return rows_of(self.predictions, self.counted)

    @cached_property
    def read(self) -> Tensor:
        """What the classifier read for the predictions that count: (rows, width)."""
        return rows_of(self.features, self.counted)

    @cached_property
    def embeddings(self) -> Tensor:
        """The last states averaged over real tokens: (batch, hidden)."""
        return pooled(self.states[-1], self.mask)


@dataclass(frozen=True)
class Sample:
    """What a teacher's classifier with a `weight` (classes, width) reads of some rows, and the logits it gives.

    `features` are (rows, width), `logits` (rows, classes).
    """

    features: Tensor
    logits: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Widths:
    """What a learned part has to fit: both hidden widths, the number of blocks compared, and `kept`, which of the
    teacher's channels the student's are, where they are known.

    Where a loss reads features there are the width of what the student's classifier reads, and a teacher's sample.
    """

    student: int
    teacher: int
    blocks: int
    kept: Sequence[int] | None = None
    features: int = 0
    sample: Sample | None = None


class Loss(Options):
    """One way to tell a student from its teacher: its fields are its options in a plan, a bare number its weight.

    `vanishes` says that it is zero, with no gradient, where both models are the same; the others are least there.
    `drawn` says that of the teacher's predictions it takes `Draws`, from which it is estimated without bias,
    `across` that it compares language models and takes a teacher whose tokens are others, `tasks` which it is for.
    """

    reads: ClassVar[Reads]
    vanishes: ClassVar[bool] = True
    drawn: ClassVar[bool] = False
    across: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ()  # all that have what it reads

    weight: float = Field(default=1.0, ge=0, description="what it counts in the sum; 0 leaves it out")

    @property
    def same_width(self) -> bool:
        """Whether the hidden widths of both models must be equal."""
        return False

    @property
    def by_rows(self) -> bool:
        """Whether it is a mean over rows of predictions, so that it can look at few at a time and takes `Projected`."""
        return not self.reads & Reads.PREDICTIONS

    @property
    def depth(self) -> int | None:
        """How many of the last blocks' states it reads; all where None."""
        return getattr(self, "last", None)

    def learned(self, widths: Widths) -> nn.Module | None:
        """What is trained along with the student, or keeps count, and is thrown away afterwards."""
        return None

    def of(self, student: Seen, teacher: Seen, own: Any = None) -> Tensor:
        """The loss, without its weight; `own` is what `learned` gave."""
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        """Take a bare number for the weight."""
        if isinstance(given, dict | Loss):
            return given
        if isinstance(given, bool) or not isinstance(given, int | float):
            met = str(given).lower() if isinstance(given, bool) else repr(given)
            raise ValueError(f"met {met}; expected its weight, or options such as {{weight: 1}}")
        return {"weight": given}

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> Any:
        """A bare number where nothing but the weight is said."""
        fields = handler(self)
        return fields if fields.keys() - {"weight"} else self.weight

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Options, or a bare number."""
        options = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [{"type": "number", "minimum": 0}, options], "description": options.pop("description", "")}


def real(values: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens in float32: (batch, sequence, any) -> (tokens, any)."""
    return picked(values, mask).float()


def rows_of(predictions: Any, counted: Tensor | None) -> Any:
    """The predictions that count: (..., classes) -> (rows, classes)."""
    if isinstance(predictions, Projected | Draws):
        return predictions if counted is None else predictions.counted(counted)
    return predictions.flatten(0, -2).float() if counted is None else real(predictions, counted)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """States (batch, sequence, hidden) averaged over real tokens: (batch, hidden)."""
    kept = states.float().masked_fill(~mask[..., None], 0.0)
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def unit(vectors: Tensor) -> Tensor:
    """Vectors scaled to length 1 along the last axis."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def cosines(vectors: Tensor) -> Tensor:
    """The cosines between all vectors (..., n, width): (..., n, n)."""
    units = unit(vectors)
    return units @ units.mT


def kl(target: Tensor, given: Tensor) -> Tensor:
    """KL(target || given) of log-probabilities along the last axis."""
    return (target.exp() * (target - given)).sum(-1)
