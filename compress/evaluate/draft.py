"""Drafts: how much faster a decoder writes when a small model writes ahead and it only checks; speculative decoding.

What is written is what the decoder writes alone (Leviathan et al., arXiv:2211.17192), so a draft has one virtue: that
its tokens are taken. Both models are counted and timed in transformers' own assisted generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from compress.errors import DataError
from compress.evaluate.run import inference
from compress.measure import Ratio, Timing, interleave, speedup
from compress.writing import Prompts, plainly


@dataclass(frozen=True)
class Drafting:
    """What a draft is worth.

    `acceptance` is the share of its tokens that the model takes, `per_run` how many tokens come of one run of the
    model, 1 without a draft; `plain` and `assisted` are the times that all `tokens` took.
    """

    acceptance: float
    per_run: float
    tokens: int
    plain: Timing
    assisted: Timing

    @property
    def speedup(self) -> Ratio:
        """How many times faster the draft makes writing, with its interval."""
        return speedup(self.plain, self.assisted)


def draft_with(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Prompts,
    *,
    tokens: int = 64,
    ahead: int = 4,
    seconds: float = 20.0,
) -> Drafting:
    """Let `model` write `tokens` after each prompt, the likeliest each time, alone and with a draft `ahead` of it.

    Ends of texts are passed over, so that all have equal lengths; the two ways are timed in turn for about so many
    seconds. Raises DataError where the models read different tokens.
    """
    sizes = [one.config.get_text_config().vocab_size for one in (model, draft)]
    if sizes[0] != sizes[1]:
        raise DataError(f"draft: it has {sizes[1]} tokens and the model {sizes[0]}; expected the same")
    alone = partial(written, model, None, prompts, tokens)
    assisted = partial(written, model, draft, prompts, tokens)
    settings = {
        "num_assistant_tokens": ahead,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    with inference(model), inference(draft), plainly(model), plainly(draft, **settings):
        with counted(model) as runs, counted(draft) as guesses:
            made = assisted()
        taken = made - runs[0]  # every run of the model gives one token of its own
        plain_times, assisted_times = interleave([alone, assisted], seconds=seconds, warm=False)
    times = Timing.of(plain_times), Timing.of(assisted_times)
    return Drafting(taken / max(1, guesses[0]), made / runs[0], made, *times)


def written(model: PreTrainedModel, draft: PreTrainedModel | None, prompts: Prompts, tokens: int) -> int:
    """Write on after each prompt by itself, and count the tokens."""
    made = 0
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        given = {"attention_mask": torch.ones_like(ids), "generation_config": GenerationConfig(max_new_tokens=tokens)}
        made += model.generate(ids, assistant_model=draft, **given).shape[1] - len(prompt)  # type: ignore[operator]
    return made


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Inside, every run of the model counts one more."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    handle = model.register_forward_hook(add)
    try:
        yield count
    finally:
        handle.remove()
