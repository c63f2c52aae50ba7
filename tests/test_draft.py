"""Drafts: a model is its own perfect draft, a stranger none, and what is written is what the model writes alone."""

from __future__ import annotations

import copy

import pytest
import torch

from compress.errors import DataError
from compress.evaluate.draft import draft_with, written
from compress.writing import plainly, write_on
from tests.texts import model

PROMPTS = [[2, 7, 9], [2, 5, 6, 7, 8, 9, 10], [2, 11]]


@pytest.fixture(scope="module")
def decoder():
    return model("AutoModelForCausalLM", "llama", eos_token_id=3, bos_token_id=2).double()


@pytest.mark.parametrize("ahead", [1, 4])
def test_a_model_takes_all_of_its_own_guesses(decoder, ahead):
    """Of 20 tokens the first run gives up to `ahead` and one; the last run guesses no more than there is room for."""
    found = draft_with(decoder, copy.deepcopy(decoder), PROMPTS, tokens=20, ahead=ahead, seconds=0.0)
    assert found.acceptance == 1
    assert found.tokens == 20 * len(PROMPTS)
    assert found.per_run == pytest.approx(20 / -(-20 // (ahead + 1)))


def test_of_a_stranger_little_is_taken_and_the_text_is_the_models(decoder):
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    found = draft_with(decoder, other, PROMPTS, tokens=20, ahead=4, seconds=0.0)
    assert found.acceptance < 0.1
    assert 1 <= found.per_run < 1.4
    with plainly(decoder, other):
        ids = torch.tensor([PROMPTS[1]])
        assisted = decoder.generate(ids, assistant_model=other, max_new_tokens=20)[0, len(PROMPTS[1]) :]
    assert [assisted.tolist()] == write_on(decoder, PROMPTS[1:2], most=20, ends=())


def test_both_ways_are_timed_in_the_same_rounds(decoder):
    found = draft_with(decoder, decoder, PROMPTS[:1], tokens=4, ahead=2, seconds=0.0)
    assert len(found.plain.samples) == len(found.assisted.samples) >= 10
    assert found.speedup.low <= found.speedup.value <= found.speedup.high


def test_ends_are_passed_over_and_settings_come_back(decoder):
    one = copy.deepcopy(decoder)
    one.generation_config.eos_token_id = write_on(one, PROMPTS[:1], most=2, ends=())[0]
    before = one.generation_config
    assert draft_with(one, copy.deepcopy(one), PROMPTS[:1], tokens=8, seconds=0.0).tokens == 8
    assert one.generation_config is before
    assert written(one, None, PROMPTS[:1], 8) < 8


def test_a_draft_of_other_tokens_is_refused(decoder):
    other = model("AutoModelForCausalLM", "llama")
    other.resize_token_embeddings(30)
    with pytest.raises(DataError, match="has 30 tokens and the model 25"):
        draft_with(decoder, other, PROMPTS)
