"""The laws of all passes that change a model's shape, for every family: what comes out runs, saves, loads and decodes.

A new pass is tested by a line in `WAYS`.
"""

from __future__ import annotations

import pytest
import torch

from compress import checkpoint
from compress.contract import Part
from compress.families import layout_of
from passes import PASSES
from tests.conftest import GENERATING, TINY, answer
from tests.paper import Paper, state_of

# What each pass is run with; {} where a pass needs nothing said.
WAYS: dict[str, list[dict]] = {
    "ziplm": [{"speedups": [1.3], "prior": "relative"}],
    "prune": [{"speedups": [1.3], "prior": "relative"}],
    "puzzle": [
        {"parameters": 0.8, "samples": 8, "attention": [0.5, "linear", "none"], "ffn": [0.5, "linear", "none"]},
        {"speedups": [1.3], "samples": 8, "attention": [0.5, "linear"], "ffn": [0.5, "linear"], "local_steps": 1},
    ],
}
CASES = [(step, index, name) for step, ways in WAYS.items() for index in range(len(ways)) for name in TINY]
DECODING = [case for case in CASES if case[2] in GENERATING]


@pytest.fixture
def outcome(request, tmp_path, monkeypatch):
    """The last state that a pass yields for a tiny model, and the tiny model."""
    step, index, name = request.param
    Paper().install(monkeypatch)
    state = state_of(TINY[name], tmp_path)
    *_, last = PASSES[step](**WAYS[step][index]).run(state)
    return last, TINY[name]


def test_every_pass_that_changes_a_shape_is_listed():
    assert {name for name, step in PASSES.items() if Part.SHAPE in step.touches} <= set(WAYS)


@pytest.mark.parametrize("outcome", CASES, indirect=True, ids=lambda case: "-".join(map(str, case)))
def test_what_comes_out_is_smaller_and_loads_as_it_was(outcome, tmp_path):
    state, tiny = outcome
    count = [sum(one.numel() for one in model.parameters()) for model in (state.model, state.dense.model)]
    assert count[0] < count[1]
    checkpoint.save(state.model, tmp_path / "saved")
    loaded = type(state.model).from_pretrained(tmp_path / "saved").eval()
    assert sum(one.numel() for one in loaded.parameters()) == count[0]
    inputs = tiny.example()
    assert torch.equal(answer(loaded, inputs), answer(state.model, inputs))
    assert layout_of(loaded) == state.layout


@pytest.mark.parametrize(
    "outcome",
    [case for case in CASES if case[2] in GENERATING],
    indirect=True,
    ids=lambda case: "-".join(map(str, case)),
)
def test_cached_generation_equals_uncached(outcome):
    state, tiny = outcome
    inputs = {**{name: value[:1] for name, value in tiny.example().items() if not name.startswith("decoder")}}
    words = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    cached, uncached = (state.model.generate(**inputs, **words, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
