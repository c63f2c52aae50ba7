"""The recipe of a training run: its options and its learning rate along the way, readable without torch."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.contract import Options

EPOCHS = 3.0  # where a plan sets no bound at all


class TrainingOptions(Options):
    """How long and how hard to train.

    `steps` (weight updates) or `epochs` bound the run, and so does `minutes`; the first one met ends it. A run bounded
    by `minutes` follows the clock, so it does not give the same bits twice, nor when resumed. One update takes
    `accumulate` batches of `batch_size` rows, which the processes of a run share alike. `validate_every` and
    `checkpoint_every` count updates; left out, the first is a tenth of the run and the second a minute. `patience` is
    the number of validations without a gain after which to stop. `precision: auto` is bfloat16 where the hardware has
    it, float32 elsewhere. With `average` it is the moving average of the weights that is validated and kept.
    Options that train `together` are for all processes of a run, others for each by itself.
    """

    together: ClassVar[bool] = False

    steps: int | None = Field(default=None, ge=1, description="weight updates")
    epochs: float | None = Field(
        default=None, gt=0, description=f"passes over the data; {EPOCHS:g} where nothing bounds the run"
    )
    minutes: float | None = Field(default=None, gt=0, description="wall-clock time at most")
    batch_size: int = Field(default=32, ge=1, description="rows a batch")
    accumulate: int = Field(default=1, ge=1, description="batches an update")
    learning_rate: float = Field(
        default=5e-5, gt=0, description="its peak; rises over `warmup`, then falls as a cosine to 0"
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the run")
    weight_decay: float = Field(default=0.01, ge=0, description="of matrices; biases and norms are let be")
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the forward and backward pass"
    )
    average: float | None = Field(
        default=None, gt=0, lt=1, description="of the weights, the share that stays at each update, fewer at first"
    )
    recompute: bool = Field(
        default=False, description="whether the backward pass computes blocks anew: slower, in far less memory"
    )
    shard: bool = Field(
        default=False, description="whether each of several processes holds a share of the weights alone (FSDP2)"
    )
    dropout: bool = Field(default=True, description="whether the model's dropout is on")
    validate_every: int | None = Field(default=None, ge=1, description="updates between validations")
    checkpoint_every: int | None = Field(default=None, ge=1, description="updates between checkpoints")
    patience: int | None = Field(default=None, ge=1, description="validations without a gain before stopping")
    seed: int = Field(default=0, ge=0, description="of the order of the data and of dropout")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingOptions:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("both steps and epochs are given; expected one of them")
        return self

    def total_steps(self, rows: int) -> int | None:
        """Weight updates for a data set of so many rows; None where only `minutes` bounds the run."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None and self.minutes is not None:
            return None
        return max(1, math.ceil((self.epochs or EPOCHS) * rows / (self.batch_size * self.accumulate)))

    def rate(self, share: float) -> float:
        """The learning rate when this share (0 to 1) of the run is done."""
        if share < self.warmup:
            return self.learning_rate * share / self.warmup
        left = min(1.0, (share - self.warmup) / (1 - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * left))
