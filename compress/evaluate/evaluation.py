"""The evaluation of a model on a split, by the measures of its task."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from compress.data import Data
from compress.errors import DataError
from compress.evaluate.answers import measure_answers
from compress.evaluate.measures import measure_classes, measure_embeddings, measure_language, measure_words
from compress.evaluate.run import Run, inference
from compress.evaluate.score import Score, bootstrap
from compress.tasks import Task

MEASURED = {
    "feature-extraction": measure_embeddings,
    "text-classification": measure_classes,
    "token-classification": measure_words,
    "question-answering": measure_answers,
    "fill-mask": measure_language,
    "text-generation": measure_language,
}


def evaluate(
    model: PreTrainedModel,
    data: Data,
    task: Task,
    *,
    split: str = "test",
    teacher: PreTrainedModel | None = None,
    batch_size: int = 32,
) -> dict[str, Score]:
    """Return the scores of `model` on a split by name; a teacher adds those that tell how alike the two are.

    Intervals are percentile bootstraps over rows (texts, pairs, questions; for packed text sequences), seeded.
    Raises DataError where the data gives nothing to score: no labels and no teacher.
    """
    with inference(model), inference(teacher or model):
        columns, measures = MEASURED[task.name](Run(model, teacher, data, split, batch_size))
    if not measures:
        raise DataError(f"data: nothing to score for {task.name}: give labels, or a teacher to compare with")
    return {name: bootstrap(measure, columns) for name, measure in measures.items()}


def headline(task: Task, scores: Mapping[str, Score]) -> tuple[str, Score]:
    """Return the name and value of the score that the task is judged by, of those there are."""
    for name in task.metrics:
        if name in scores:
            return name, scores[name]
    raise DataError(f"none of the headline scores of {task.name} ({', '.join(task.metrics)}) could be computed")
