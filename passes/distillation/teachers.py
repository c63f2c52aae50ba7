"""Teachers: whom a stage of recovery learns from, where that is not the dense model, and what several say together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import ModelOutput

from compress.contract import VOCABULARY
from compress.errors import TrainingError
from compress.families import layout_of
from compress.runtimes.examples import longest_sequence
from compress.state import State, Teacher
from passes.distillation.losses import LOSSES
from passes.distillation.translation import Translation

DENSE = "dense"
Rule = Callable[[Sequence[Tensor]], Tensor]
PREDICTED = ("logits", "start_logits", "end_logits")


class Ensemble(nn.Module):
    """Several models as one: its predictions are what `rule` makes of their logits, all else is the first model's."""

    def __init__(self, models: Sequence[nn.Module], rule: Rule) -> None:
        super().__init__()
        self.models, self.rule = nn.ModuleList(models), rule

    @property
    def config(self) -> Any:
        """The config of the first."""
        return self.models[0].config

    def get_output_embeddings(self) -> None:
        """None: what it predicts is no one head's."""

    def forward(self, **inputs: Any) -> ModelOutput:
        """The outputs of the first, with the predictions of all."""
        outputs = [model(**inputs) for model in self.models]
        for name in PREDICTED:
            if name in outputs[0]:
                outputs[0][name] = self.rule([one[name].float() for one in outputs])
        return outputs[0]


def mean(logits: Sequence[Tensor], surest: bool = False) -> Tensor:
    """Logits (..., classes) whose softmax is the mean of the others'; of a single class, a score, the mean itself.

    Where the `surest` count most, a row's weights are ``softmax(-entropy)`` of what is predicted of it.
    """
    together = torch.stack(list(logits))
    if together.shape[-1] == 1:
        return together.mean(0)
    logs = together.log_softmax(-1)
    weights = (logs.exp() * logs).sum(-1) if surest else logs.new_zeros(logs.shape[:-1])
    return (logs + weights.log_softmax(0)[..., None]).logsumexp(0)


def shift(logits: Sequence[Tensor]) -> Tensor:
    """``third + first - second``: what a model would predict that changed as the first has from the second.

    Proxy tuning (Liu et al., arXiv:2401.08565), here a goal for the third itself, as in Delta-KD (Cao et al.,
    arXiv:2509.14526).
    """
    after, before, base = logits
    return base + after - before


RULES: dict[str, Rule] = {"mean": mean, "surest": partial(mean, surest=True), "shift": shift}


@contextmanager
def taught_by(
    state: State, sources: Sequence[str], combine: str = "mean", across: bool = False
) -> Iterator[Translation | None]:
    """Inside, the model learns from those of `sources` (folders or hub names, `dense`) and of the state's `others`.

    With none of either it learns from the dense model, as ever. What one of `others` has for its dense model, which a
    fine-tuned one is itself, is afterwards this model's as well, if it has the same layout. `across` tokenizers goes
    what is compared; then a single teacher may read other tokens, and the translation into them is given. Raises
    TrainingError where another reads them, or where there are not as many as are combined.
    """
    if not sources and not state.others:
        yield None
        return
    alone = across and state.task.generates and len(sources) == 1 and not state.others
    teachers: list[Any] = [_from(state, source, any_tokens=alone) for source in sources]
    translation = _translation(state, sources[0], teachers[0]) if alone else None
    kin = all(layout_of(one).stacks == layout_of(state.dense.model).stacks for one in teachers)
    for other in state.others:
        _same_tokens(state, other.tokenizer, "the model of the step that it follows")
        teachers.append(other.model.eval().requires_grad_(False))
    if combine == "shift":
        teachers.append(copy.deepcopy(state.model).eval().requires_grad_(False))
    if len(teachers) != 3 if combine == "shift" else combine == "surest" and len(teachers) < 2:
        met, expected = (len(teachers) - 1, "two") if combine == "shift" else (1, "several")
        raise TrainingError(f"distill: {met} teachers to combine by {combine}; expected {expected}")
    dense, facts, kept = state.dense, state.facts, state.kept
    for other in state.others:
        if layout_of(other.dense.model) == layout_of(dense.model):
            dense = other.dense
    state.dense = Teacher(None, state.task, kin)
    vars(state.dense)["model"] = teachers[0] if len(teachers) == 1 else Ensemble(teachers, RULES[combine])
    state.facts = {name: value for name, value in state.facts.items() if name != VOCABULARY.name}
    state.kept = {}  # these were the dense model's units
    try:
        yield translation
    finally:
        state.dense, state.facts, state.kept = dense, facts, kept


def _from(state: State, source: str, any_tokens: bool) -> PreTrainedModel:
    """The model of a source; the dense one has the tokens that are left."""
    if source == DENSE:
        return state.teacher
    model = state.task.load(source).eval().requires_grad_(False)
    if not any_tokens:
        _same_tokens(state, AutoTokenizer.from_pretrained(source), source)
    return model


def _translation(state: State, source: str, teacher: PreTrainedModel) -> Translation | None:
    """Into the tokens of a source; None where they are those of the state's data."""
    if source == DENSE:
        return None
    mine, theirs = state.data.tokenizer, AutoTokenizer.from_pretrained(source)
    return None if mine.get_vocab() == theirs.get_vocab() else Translation(mine, theirs, longest_sequence(teacher))


def _same_tokens(state: State, tokenizer: Any, who: str) -> None:
    """Raise TrainingError unless a tokenizer has the vocabulary of the state's."""
    mine, theirs = (None if one is None else one.get_vocab() for one in (state.tokenizer, tokenizer))
    if mine != theirs:
        counts = [0 if one is None else len(one) for one in (mine, theirs)]
        able = " and ".join(name for name, cls in LOSSES.items() if cls.across)
        raise TrainingError(
            f"distill: {who} reads other tokens, {counts[1]} of them and {counts[0]} here; expected a teacher with the "
            f"tokenizer of this model or, for text-generation, one teacher in teachers and no losses of it but {able}"
        )
