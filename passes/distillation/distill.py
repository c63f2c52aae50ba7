"""Distill: recover a pruned model by training it to do what the dense one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from compress.contract import TEACHER, Options, Part, Pass
from compress.recipe import TrainingOptions

if TYPE_CHECKING:
    from torch import nn

    from compress.state import State
    from compress.tasks import Task


class Weights(Options):
    """The weight of each loss, by its name in `LOSSES`; `task` is the model's own loss on labelled data."""

    hidden: float = Field(
        default=0.0, ge=0, description="states after every block, relative to the teacher's (SquareHead)"
    )
    tokens: float = Field(default=0.0, ge=0, description="states after every block, squared distance (ZipLM)")
    logits: float = Field(default=0.0, ge=0, description="divergence of the predictions")
    embedding: float = Field(default=0.0, ge=0, description="cosine distance of mean-pooled embeddings")
    similarity: float = Field(
        default=0.0, ge=0, description="cosines between the embeddings of a batch, of any width; squared error"
    )
    task: float = Field(default=0.0, ge=0, description="the model's own loss against the labels")

    @model_validator(mode="after")
    def _some_weight(self) -> Weights:
        if not any(self.model_dump().values()):
            raise ValueError("every loss has a weight of 0; expected one above 0")
        return self

    @classmethod
    def fitting(cls, task: Task, labelled: bool, same_width: bool = True) -> Weights:
        """The weights where a plan gives none; labels help a classifier, a language model is better off without.

        Hidden states of unlike widths can't be compared.
        """
        hidden = 1.0 if same_width else 0.0
        if task.name == "feature-extraction":
            return cls(hidden=hidden, embedding=hidden, similarity=1.0 - hidden)
        return cls(hidden=hidden, logits=1.0, task=1.0 if labelled and not task.packs else 0.0)


class Distill(TrainingOptions, Pass):
    """Train the model towards the teacher's hidden states and predictions, validated by the same loss.

    Without `losses` the weights fit the task. Where blocks were dropped, each one left is compared with the one it was;
    where the hidden width is another, predictions or similarities alone are. Dropout is off, as the teacher's is.
    Embedding tables, and heads tied to them, stay as they are unless `embeddings` says otherwise or the width is
    another: nothing was cut from them, and they hold most parameters of a small model, so that a step without them
    takes about half the time.
    """

    version = 2

    requires = frozenset({TEACHER})
    touches = Part.VALUES

    learning_rate: float = Field(
        default=2e-4, gt=0, description="its peak; rises over `warmup`, then falls as a cosine to 0"
    )
    dropout: bool = Field(default=False, description="whether the student's dropout is on")
    embeddings: bool | None = Field(
        default=None, description="whether embedding tables are trained as well; left out, where their width was cut"
    )
    losses: Weights | None = Field(default=None, description="weight of each loss; left out, what fits the task")
    temperature: float = Field(default=1.0, gt=0, description="softens the predictions that are compared")
    epsilon: float = Field(
        default=1e-8, gt=0, description="added to the teacher's mean square; the paper's script has 2**-7"
    )
    validation_rows: int = Field(default=512, ge=1, description="rows that a validation looks at, drawn once")

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with the weights of the lowest validation loss."""
        from compress.training import train
        from passes.distillation.compare import Comparison, same_hidden_width

        data = state.data
        sample = next(iter(data.batches("train", 1)), {})
        labelled, same_width = not sample.keys() <= Comparison.inputs, same_hidden_width(state)
        weights = self.losses or Weights.fitting(state.task, labelled, same_width)
        tables_too = not same_width if self.embeddings is None else self.embeddings
        compare = Comparison(weights.model_dump(), state, self.temperature, self.epsilon)
        batches = max(1, self.validation_rows // self.batch_size)
        with nullcontext() if tables_too else still_tables(compare.student):
            result = train(
                compare.student,
                lambda epoch: data.batches("train", self.batch_size, seed=self.seed + epoch),
                compare.losses,
                self,
                folder=state.workshop.step,
                total_steps=self.total_steps(data.count("train")),
                validate=lambda: compare.mean(islice(data.batches("validation", self.batch_size, seed=0), batches)),
                what="distill",
            )
        compare.teacher.to(state.model.device)  # the comparison took it to where the training was
        state.figures |= {
            "losses": weights.model_dump(exclude_defaults=True),
            "loss_before": result.history[0]["validation"],
            "loss_after": result.best_score,
            "steps": result.steps,
            "best_step": result.best_step,
            "training_seconds": result.seconds,
            "history": result.history,
        }
        yield state


@contextmanager
def still_tables(model: nn.Module) -> Iterator[None]:
    """Inside, no embedding table of the model is trained."""
    from torch import nn

    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    trained = [table for table in tables if table.requires_grad]
    for table in trained:
        table.requires_grad_(False)
    try:
        yield
    finally:
        for table in trained:
            table.requires_grad_(True)
