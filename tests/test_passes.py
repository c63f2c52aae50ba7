"""The laws of all passes that change a model's shape, for every family: what comes out runs, saves, loads and decodes.

A new pass is tested by a line in `WAYS`.
"""

from __future__ import annotations

import re

import pytest
import torch

from compress import checkpoint
from compress.contract import Part
from compress.errors import LayoutError, ReachError
from compress.families import layout_of
from passes import PASSES
from tests.conftest import TINY, assert_one_model
from tests.paper import Paper, state_of

# What each pass is run with; {} where a pass needs nothing said.
WAYS: dict[str, list[dict]] = {
    "ziplm": [
        {"speedups": [1.3], "prior": "relative"},
        {"speedups": [1.3], "prior": "relative", "search": "spdy", "search_trials": 2, "search_samples": 8},
        {"parameters": 0.6, "prior": "relative"},
    ],
    "prune": [{"speedups": [1.3], "prior": "relative"}],
    "optin": [{"speedups": [1.3], "samples": 16, "groups": 3}],
    "drop_blocks": [
        {"remove": 1, "samples": 8},
        {"remove": 1, "score": "angular", "samples": 8, "keep_last": 0},
        {"speedups": [1.05], "score": "influence", "parts": "sub-blocks", "samples": 8},
    ],
    # Three blocks have one that may go and none that may share; tests/test_fold.py shares among more.
    "fold": [
        {"remove": 1, "group": 1, "gate_steps": 2, "samples": 4},
        {"remove": 1, "group": 1, "rank": "cosine", "samples": 4},
    ],
    "vocabulary": [],  # needs a tokenizer and its texts, so its laws stand in test_vocabulary.py
    "minitron": [
        {"parameters": 0.5, "candidates": 1, "recovery_steps": 0},
        {"columns": 16, "recovery_steps": 0, "rescale": True},
    ],
    "slice_hidden": [{"share": 0.6, "samples": 8}],
    "puzzle": [
        {"parameters": 0.8, "samples": 8, "attention": [0.5, "linear", "none"], "ffn": [0.5, "linear", "none"]},
        {"speedups": [1.3], "samples": 8, "attention": [0.5, "linear"], "ffn": [0.5, "linear"], "local_steps": 1},
    ],
}
POST_NORM = (
    "bert", "bert-classifier", "bert-decoder", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet",
)  # fmt: skip
REFUSALS = {  # what a pass says to a family it can't cut
    ("minitron", "whisper"): "expected one number for all blocks",
    **{("slice_hidden", name): r"LayerNorm' gives goes into add; expected a pre-norm model" for name in POST_NORM},
    ("slice_hidden", "gemma3"): r"'model.layers.0.post_attention_layernorm' gives goes into add; expected a pre-norm",
    ("slice_hidden", "whisper"): r"'model.encoder.conv2.weight' reads what no norm gave",
    ("slice_hidden", "t5"): r"what 'decoder.final_layer_norm' gives goes into mul",
    ("slice_hidden", "t5-gated"): r"what 'decoder.final_layer_norm' gives goes into mul",
}
CASES = [
    (step, index, name)
    for step, ways in WAYS.items()
    for index in range(len(ways))
    for name in TINY
    if (step, name) not in REFUSALS
]

BUDGETS = {"speedups", "speedup", "parameters"}  # options that a model may be unable to keep
BEYOND = {  # what each pass with such an option is run with, what it says, and whether it tells the fastest
    "ziplm": [
        ({"speedups": [1.3, 100, 1.5], "prior": "relative"}, r"100x is out of reach.*fastest sizes measure", True),
        ({"parameters": 0.01, "prior": "relative"}, "0.01 of the parameters is out of reach.*smallest sizes", False),
    ],
    "prune": [
        ({"speedups": [100, 1.3], "prior": "relative"}, "100x is out of reach", True),
        ({"parameters": 0.01, "prior": "relative"}, "0.01 of the parameters is out of reach", False),
    ],
    "optin": [
        ({"speedups": [1.3, 100], "samples": 16, "groups": 3}, "100x is out of reach", True),
        ({"parameters": 0.01, "samples": 16, "groups": 3}, "0.01 of the parameters is out of reach", False),
    ],
    "drop_blocks": [
        ({"speedups": [1.05, 3], "samples": 8}, r"3x is out of reach.*without 1 blocks, the most that can go", True)
    ],
    "slice_hidden": [
        ({"parameters": 0.01, "samples": 8}, "parameters 0.01 leaves no multiple of 1 of the 24 channels", False)
    ],
    "minitron": [
        ({"speedup": 100, "recovery_steps": 0, "candidates": 1}, r"100x is out of reach.*fastest shape", True),
        ({"parameters": 0.001, "recovery_steps": 0, "candidates": 1}, "no shape keeps 0.001 of the parameters", False),
    ],
    "puzzle": [
        ({"speedups": [1.3, 100], "samples": 8}, "100x is out of reach", True),
        ({"parameters": 0.01, "samples": 8}, "parameters: 0.01 at most was asked; the least", False),
        # The third would have to differ from the others in more than it can.
        (
            {"parameters": 0.9, "samples": 8, "solutions": 3, "alpha": 0, "attention": [0.5], "ffn": [0.5]},
            "differs from 2 others",
            False,
        ),
    ],
}


@pytest.fixture
def outcome(request, tmp_path, monkeypatch):
    """The last state that a pass yields for a tiny model, and the tiny model."""
    step, index, name = request.param
    Paper().install(monkeypatch)
    state = state_of(TINY[name], tmp_path)
    *_, last = PASSES[step](**WAYS[step][index]).run(state)
    return last, TINY[name]


def test_every_pass_that_changes_a_shape_is_listed():
    touched = {
        name: step.touches if isinstance(step.touches, Part) else step().touches for name, step in PASSES.items()
    }
    assert {name for name, parts in touched.items() if Part.SHAPE in parts} <= set(WAYS)


def test_every_pass_that_takes_a_budget_is_listed():
    takers = {name for name, step in PASSES.items() if BUDGETS & step.model_fields.keys()}
    assert takers == set(BEYOND)


@pytest.mark.parametrize(
    ("step", "options", "said", "timed"), [(step, *case) for step, cases in BEYOND.items() for case in cases]
)
def test_a_budget_out_of_reach_is_told_and_the_others_are_kept(step, options, said, timed, tmp_path, monkeypatch):
    Paper().install(monkeypatch)
    told = PASSES[step](**options)
    found = list(told.run(state_of(TINY["llama"], tmp_path)))
    assert len(found) == len(told.branches)
    missed = [one for one in found if isinstance(one, ReachError)]
    assert len(missed) == 1
    assert re.search(said, str(missed[0]))
    assert (missed[0].fastest is not None) == timed
    for branch in found:
        if branch is not missed[0]:
            assert branch.figures.get("met", True)


@pytest.mark.parametrize(("step", "name"), REFUSALS)
def test_a_family_that_cannot_be_cut_is_refused(step, name, tmp_path):
    state = state_of(TINY[name], tmp_path)
    for options in WAYS[step]:
        with pytest.raises(LayoutError, match=REFUSALS[step, name]):
            list(PASSES[step](**options).run(state))


@pytest.mark.parametrize("outcome", CASES, indirect=True, ids=lambda case: "-".join(map(str, case)))
def test_what_comes_out_is_smaller_loads_as_it_was_and_decodes(outcome, tmp_path):
    state, tiny = outcome
    count = [sum(one.numel() for one in model.parameters()) for model in (state.model, state.dense.model)]
    assert count[0] < count[1]
    checkpoint.save(state.model, tmp_path / "saved")
    loaded = type(state.model).from_pretrained(tmp_path / "saved").eval()
    assert sum(one.numel() for one in loaded.parameters()) == count[0]
    assert_one_model(loaded, state.model, tiny.example())
    assert layout_of(loaded) == state.layout
    if tiny.generates:
        inputs = {name: value[:1] for name, value in tiny.example().items() if not name.startswith("decoder")}
        words = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
        cached, uncached = (state.model.generate(**inputs, **words, use_cache=use) for use in (True, False))
        assert torch.equal(cached, uncached)
