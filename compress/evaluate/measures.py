"""Measures: for each task, what is kept of every sequence and which scores are taken from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.data.batches import IGNORED
from compress.errors import DataError
from compress.evaluate import metrics
from compress.evaluate.run import Batch, Measured, Run, embed, likeness, overconfidence

ALIKE = {"top1_agreement": "agrees", "kl": "divergence", "probability_loyalty": "loyalty"}  # metric -> column


def measure_embeddings(run: Run) -> Measured:
    """Cosine of each embedding to the teacher's; with pairs, the rank correlation of their cosines and their scores."""

    def columns_of(numbers: Sequence[int], batch: Batch, outputs: Any, taught: Any) -> dict[str, Tensor]:
        embeddings = {"embedding": embed(outputs, batch["attention_mask"])}
        if taught is not None:
            theirs = embed(taught, batch["attention_mask"].to(taught.last_hidden_state.device))
            embeddings["cosine"] = (embeddings["embedding"] * theirs.to(run.model.device)).sum(-1)
        return embeddings

    met = run.columns(columns_of)
    sides = len(run.data.split(run.split).rows[0].texts)
    columns, measures = {}, {}
    if "cosine" in met:
        columns["cosine"] = met["cosine"].reshape(-1, sides).mean(1)
        measures["cosine"] = metrics.mean("cosine")
    scores = run.data.scores(run.split)
    if scores is not None:
        columns["score"] = scores
        columns["similarity"] = (met["embedding"][0::2] * met["embedding"][1::2]).sum(1)
        measures["spearman"] = metrics.spearman("similarity", "score")
    return columns, measures


def measure_classes(run: Run) -> Measured:
    """Accuracy, F1 and Matthews correlation of classes, or the correlations of scores; likeness to the teacher."""
    scored = run.model.config.num_labels == 1
    check_labels(run)

    def columns_of(numbers: Sequence[int], batch: Batch, outputs: Any, taught: Any) -> dict[str, Tensor]:
        logits = outputs.logits
        columns = {"predicted": logits[:, 0] if scored else logits.argmax(-1)}
        if "labels" in batch:
            columns["label"] = batch["labels"]
        if "labels" in batch and not scored:
            columns["gap"] = overconfidence(logits, batch["labels"])
        if taught is not None and scored:
            columns["taught"] = taught.logits[:, 0].to(logits.device)
        elif taught is not None:
            columns |= likeness(logits, taught.logits)._asdict()
        return columns

    columns = run.columns(columns_of)
    measures: dict[str, metrics.Measure] = {}
    if "label" in columns and scored:
        measures |= {
            "spearman": metrics.spearman("predicted", "label"),
            "pearson": metrics.pearson("predicted", "label"),
        }
    elif "label" in columns:
        measures |= {"accuracy": metrics.accuracy, "f1": metrics.f1, "matthews": metrics.matthews}
        measures["calibration_error"] = metrics.calibration_error()
    if "taught" in columns:
        measures["teacher_pearson"] = metrics.pearson("predicted", "taught")
        measures["teacher_spearman"] = metrics.spearman("predicted", "taught")
    return columns, {**measures, **mean_likeness(columns)}


def mean_likeness(columns: metrics.Columns) -> dict[str, metrics.Measure]:
    """Measures of likeness to the teacher, where there was one."""
    return {name: metrics.mean(column) for name, column in ALIKE.items() if column in columns}


def check_labels(run: Run) -> None:
    """Raise DataError where the labels of the data can't be the model's."""
    outputs, names = int(run.model.config.num_labels or 1), run.data.labels
    if names is not None and (outputs == 1 or len(names) > outputs):
        raise DataError(f"data.label: {len(names)} classes ({', '.join(names[:20])}); the model has {outputs} outputs")
    if run.data.regression and outputs != 1:
        raise DataError(f"data.label: scores; the model has {outputs} classes, and 1 output is expected")


def token_columns(logits: Tensor, labels: Tensor, taught: Tensor | None) -> dict[str, Tensor]:
    """Sums per sequence over labelled tokens: loss, tokens, right ones, and likeness to the teacher.

    Logits (batch, length, classes), labels (batch, length). Sequence by sequence, since a vocabulary's logits are
    large.
    """
    rows = []
    for row, targets in enumerate(labels):
        used = targets != IGNORED
        chosen, wanted = logits[row, used], targets[used]
        loss = functional.cross_entropy(chosen.float(), wanted, reduction="sum")
        sums = {"loss": loss, "tokens": used.sum(), "right": (chosen.argmax(-1) == wanted).sum()}
        sums["gap"] = overconfidence(chosen, wanted).sum(0)
        if taught is not None:
            alike = likeness(chosen, taught[row, used.to(taught.device)])
            sums |= {name: part.sum() for name, part in alike._asdict().items()}
        rows.append(sums)
    return {name: torch.stack([sums[name] for sums in rows]).double() for name in rows[0]}


def token_likeness(columns: metrics.Columns) -> dict[str, metrics.Measure]:
    """Measures of likeness to the teacher over tokens, where there was one."""
    return {name: metrics.ratio(column, "tokens") for name, column in ALIKE.items() if column in columns}


def measure_language(run: Run) -> Measured:
    """Perplexity of the next tokens, or of the masked ones; likeness to the teacher on the same."""
    shift = 1 if run.data.task.name == "text-generation" else 0

    def columns_of(numbers: Sequence[int], batch: Batch, outputs: Any, taught: Any) -> dict[str, Tensor]:
        length = batch["labels"].shape[1] - shift
        theirs = taught.logits[:, :length] if taught is not None else None
        return token_columns(outputs.logits[:, :length], batch["labels"][:, shift:], theirs)

    columns = run.columns(columns_of)
    calibration = {"calibration_error": metrics.calibration_error("tokens")}
    return columns, {"perplexity": metrics.perplexity, **calibration, **token_likeness(columns)}


def measure_words(run: Run) -> Measured:
    """F1 of the tags other than O, accuracy of all; likeness to the teacher on tagged tokens."""
    check_labels(run)
    names = run.data.labels or ()
    outside = names.index("O") if "O" in names else 0

    def columns_of(numbers: Sequence[int], batch: Batch, outputs: Any, taught: Any) -> dict[str, Tensor]:
        labels, given = batch["labels"], outputs.logits.argmax(-1)
        used, true = labels != IGNORED, (labels != IGNORED) & (labels != outside)
        return token_columns(outputs.logits, labels, taught.logits if taught is not None else None) | {
            "hits": (true & (given == labels)).sum(1),
            "given": (used & (given != outside)).sum(1),
            "true": true.sum(1),
        }

    columns = run.columns(columns_of)
    measures = {"f1": metrics.micro_f1, "accuracy": metrics.ratio("right", "tokens")}
    measures["calibration_error"] = metrics.calibration_error("tokens")
    return columns, {**measures, **token_likeness(columns)}
