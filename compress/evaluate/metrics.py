"""Metrics: pure functions of columns of numbers with one entry per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats

Columns = Mapping[str, np.ndarray]
Measure = Callable[[Columns], float]


def mean(name: str) -> Measure:
    """The mean of a column."""
    return lambda columns: float(columns[name].mean())


def ratio(total: str, count: str) -> Measure:
    """The sum of a column over the sum of another: a mean over tokens from sums per row."""
    return lambda columns: float(columns[total].sum() / columns[count].sum())


def calibration_error(count: str | None = None) -> Measure:
    """Expected calibration error (ECE; Guo et al., arXiv:1706.04599), from the column `gap` (rows, bins).

    A row holds the confidence less the correctness of its predictions, summed in the bin of their confidence; `count`
    is the column with their number, one a row where it is None. 0 where each bin is right as often as it is sure.
    """

    def measure(columns: Columns) -> float:
        total = columns[count].sum() if count else len(columns["gap"])
        return float(np.abs(columns["gap"].sum(0)).sum() / total)

    return measure


def perplexity(columns: Columns) -> float:
    """The exponential of the mean negative log likelihood of a token, from `loss` and `tokens` per row."""
    return float(np.exp(ratio("loss", "tokens")(columns)))


def accuracy(columns: Columns) -> float:
    """Share of rows whose `predicted` class is their `label`."""
    return float((columns["predicted"] == columns["label"]).mean())


def f1(columns: Columns) -> float:
    """Harmonic mean of precision and recall of class 1 of two, or averaged over more classes (macro)."""
    predicted, label = columns["predicted"], columns["label"]
    classes = np.union1d(predicted, label)
    classes = np.array([1]) if classes.max(initial=0) <= 1 else classes
    both = np.array([((predicted == one) & (label == one)).sum() for one in classes])
    either = np.array([(predicted == one).sum() + (label == one).sum() for one in classes])
    return float(np.mean(2 * both / np.maximum(either, 1)))


def matthews(columns: Columns) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 where one class is all there is."""
    predicted, label = columns["predicted"], columns["label"]
    classes = np.union1d(predicted, label)
    guesses = np.array([(predicted == one).mean() for one in classes])
    truths = np.array([(label == one).mean() for one in classes])
    spread = np.sqrt((1 - (guesses**2).sum()) * (1 - (truths**2).sum()))
    return float(((predicted == label).mean() - (guesses * truths).sum()) / spread) if spread > 0 else 0.0


def pearson(first: str, second: str) -> Measure:
    """Pearson's correlation of two columns; not a number where one of them is constant."""
    return lambda columns: correlation(columns[first], columns[second])


def spearman(first: str, second: str) -> Measure:
    """Spearman's rank correlation of two columns, ties at their mean rank."""
    return lambda columns: correlation(stats.rankdata(columns[first]), stats.rankdata(columns[second]))


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two arrays, not a number where one of them is constant."""
    first, second = first - first.mean(dtype=np.float64), second - second.mean(dtype=np.float64)
    spread = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / spread) if spread > 0 else float("nan")


def micro_f1(columns: Columns) -> float:
    """F1 over all tokens that have, or are given, a tag other than O: from `hits`, `given` and `true` per row."""
    total = columns["given"].sum() + columns["true"].sum()
    return float(2 * columns["hits"].sum() / total) if total else 0.0
