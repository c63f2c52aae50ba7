"""Writing: what a decoder goes on with after many prompts at once, padded on the left, with its cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompts = Sequence[Sequence[int]]  # the tokens of each


def write_on(
    model: PreTrainedModel, prompts: Prompts, *, most: int, ends: Collection[int], temperature: float = 0.0
) -> list[list[int]]:
    """The tokens that a model writes after each prompt: `most` of them, or up to the first of `ends`, itself included.

    The likeliest token each time, or at a temperature above 0 one drawn from the whole distribution by torch's own
    random numbers. No gradient goes through it, and dropout is off.
    """
    longest, pad = max(map(len, prompts)), min(ends, default=0)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    training, home = model.training, model.device
    model.eval()
    try:
        with torch.no_grad(), plainly(model):
            given = {"attention_mask": mask.to(home), "generation_config": how(most, ends, pad, temperature)}
            written = model.generate(ids.to(home), **given)  # type: ignore[operator]  # a mixin's method
    finally:
        model.train(training)
    return [until(row, ends) for row in written[:, longest:].tolist()]


@contextmanager
def plainly(*models: PreTrainedModel, **settings: Any) -> Iterator[None]:
    """Inside, models write by these settings and none of their own: nothing bends a distribution or ends a text."""
    own = [model.generation_config for model in models]
    try:
        for model in models:
            model.generation_config = GenerationConfig(**settings)
        yield
    finally:
        for model, settings_before in zip(models, own, strict=True):
            model.generation_config = settings_before


def how(most: int, ends: Collection[int], pad: int, temperature: float) -> GenerationConfig:
    """The settings of transformers' generation; left unsaid, only the 50 likeliest tokens would be drawn from."""
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    return GenerationConfig(max_new_tokens=most, eos_token_id=sorted(ends) or None, pad_token_id=pad, **drawn)


def until(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first of `ends`, itself included; all where there is none."""
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The tokens with which a text ends, by the tokenizer and by the model's settings for generation."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = [own] if isinstance(own, int) else list(own or [])
    written = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset([*named, *([] if written is None else [written])])
