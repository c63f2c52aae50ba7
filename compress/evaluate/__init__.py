"""Evaluation: what a model scores on a split, and how true it stays to its teacher, each with its uncertainty."""

from compress.evaluate.evaluation import evaluate, headline
from compress.evaluate.run import embed
from compress.evaluate.score import Score, bootstrap
from compress.evaluate.similarity import layer_similarity

__all__ = ["Score", "bootstrap", "embed", "evaluate", "headline", "layer_similarity"]
