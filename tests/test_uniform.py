"""The laws of narrowing, for every family: the narrowed model is the stock model of its config."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from compress.errors import LayoutError
from compress.families import layout_of
from compress.layout import record_of
from compress.uniform import HIDDEN, narrow, places, resized, spans, tied_to_heads
from tests.conftest import TINY, answer

UNLIKE = {"whisper"}  # heads of 6 and of 8 places: no hidden width but the whole holds both


def half(model, layout):
    """Units to keep: the channels of two heads where the family couples them, every other channel elsewhere."""
    heads = [axis for axis in layout.axes.values() if axis.kind == "heads"]
    keep = {axis.name: range(1, axis.units, 2) for axis in layout.axes.values() if axis.kind == "columns"}
    if not tied_to_heads(model, layout):
        return {**keep, HIDDEN: range(0, model.config.hidden_size, 2)}
    size = places(heads[0])
    keep |= {axis.name: [0, 2] for axis in heads}
    return {**keep, HIDDEN: range(0, 2 * size)}


@pytest.mark.parametrize("name", TINY)
def test_keeping_all_is_the_identity(name):
    model = TINY[name].build()
    same = narrow(model, layout_of(model), {})
    inputs = TINY[name].example()
    assert torch.equal(answer(same, inputs), answer(model, inputs))
    assert {k: v.shape for k, v in same.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", set(TINY) - UNLIKE)
def test_half(name, tmp_path):
    model = TINY[name].build()
    layout = layout_of(model)
    keep = half(model, layout)
    small = narrow(model, layout, keep)
    assert answer(small, TINY[name].example()).isfinite().all()
    small.save_pretrained(tmp_path)
    print(small.config)
