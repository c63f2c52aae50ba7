"""OPTIN: what masking does to all that comes after, the curves made of it, and the promise they meet."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from compress.errors import DataError
from passes.pruning.widths.optin import Optin
from passes.pruning.widths.trajectory import Dense, column_magnitudes, curve_of, trajectory_curves
from tests.conftest import TINY
from tests.paper import Paper, state_of


@pytest.fixture
def bert(tmp_path):
    return state_of(TINY["bert"], tmp_path)


def batch_of(state, rows=6):
    return {name: value[-rows:] for name, value in state.data.tensors.items()}


def curves_of(state, axes=None, batches=None, groups=4):
    axes = [state.layout.axes[name] for name in axes or state.layout.axes]
    return trajectory_curves(state.model, state.layout, axes, batches or [batch_of(state)], groups)


@pytest.mark.parametrize(
    ("importances", "runs", "magnitudes", "order", "losses"),
    [
        ([3.0, 1.0], [[0], [1]], None, (1, 0), [0, 1, 4]),
        ([3.0, 1.0], [[2, 0], [1, 3]], [1.0, 1.0, 0.0, 2.0], (1, 3, 2, 0), [0, 0.2, 1, 1, 4]),
        ([2.0], [[0, 1]], [0.0, 0.0], (0, 1), [0, 1, 2]),
    ],
)
def test_curves_add_up_importances_in_rising_order(importances, runs, magnitudes, order, losses):
    curve = curve_of(np.array(importances), [np.array(run) for run in runs], magnitudes and np.array(magnitudes))
    assert curve.order == order
    assert curve.losses == pytest.approx(losses)


def test_a_stray_is_the_sum_over_later_blocks_and_the_answer(bert):
    batch, name = batch_of(bert), "encoder.layer.0.heads"
    mask = batch["attention_mask"].bool()

    def states():
        with torch.no_grad():
            return bert.model(**batch, output_hidden_states=True).hidden_states

    with torch.no_grad():
        dense, before = Dense(bert.model, bert.layout, batch), states()
        bert.layout.silence(bert.model, name, [1])
        after, found = states(), dense.stray("encoder.layer.0")
    places = (2, 3, 3)  # after the second and third block, the last of which gives the answer
    changes = [((after[i] - before[i]).square().sum(-1) / before[i].square().sum(-1))[mask].mean() for i in places]
    assert found == pytest.approx(float(sum(changes)), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert-classifier", "t5", "vit"])
def test_models_with_logits_stray_by_their_divergence(name, tmp_path):
    state = state_of(TINY[name], tmp_path)
    batch = batch_of(state)
    last = [axis for axis in state.layout.axes.values() if axis.kind == "columns"][-1]
    with torch.no_grad():
        dense = Dense(state.model, state.layout, batch)
        assert dense.stray(last.block) == pytest.approx(0, abs=1e-6)
        state.layout.silence(state.model, last.name, range(last.units))
        logits = state.model(**batch).logits
        found = dense.stray(last.block)  # no block is later
    rows = batch["attention_mask"].bool() if name == "llama" else ...
    p, q = dense.answer.logits[rows].log_softmax(-1), logits[rows].log_softmax(-1)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found > 1e-6


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "whisper", "mpnet", "opt"])
def test_units_that_say_nothing_go_first_and_for_nothing(name, tmp_path):
    state = state_of(TINY[name], tmp_path)
    silent = {axis.name: [1] if axis.kind == "heads" else [0, 5, 7] for axis in state.layout.axes.values()}
    for axis, units in silent.items():
        state.layout.silence(state.model, axis, units)
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    for axis, curve in curves_of(state, groups=40).items():
        costs = np.diff(curve.losses)
        assert len(costs) == state.layout.axes[axis].units
        assert (costs[[curve.order.index(unit) for unit in silent[axis]]] == 0).all()
        assert (costs >= 0).all()
        assert costs[-1] > 0
    assert all(torch.equal(before[key], value) for key, value in state.model.state_dict().items())


def test_a_single_group_is_ordered_by_magnitude(bert):
    name, batch = "encoder.layer.1.columns", batch_of(bert)
    axis, seen = bert.layout.axes[name], []
    reader = bert.model.get_submodule(axis.readers[0].module)
    handle = reader.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        bert.model(**batch)
    handle.remove()
    real = seen[0][batch["attention_mask"].bool()]
    expected = (real.square().sum(0).sqrt() * reader.weight.norm(dim=0)).detach().numpy()
    found = column_magnitudes(bert.model, bert.layout, [axis], [batch])[name]
    assert found == pytest.approx(expected, rel=1e-4)
    assert curves_of(bert, [name], groups=1)[name].order == tuple(np.argsort(found))


def test_padding_has_no_say_and_batches_only_split_the_rows(bert):
    batch = batch_of(bert)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    whole, padded = (curves_of(bert, batches=[one]) for one in (batch, other))
    unpadded = {name: value[:-1] for name, value in batch.items()}
    once = curves_of(bert, batches=[unpadded])
    halves = [{name: value[at] for name, value in unpadded.items()} for at in (slice(0, 3), slice(3, 5))]
    twice = curves_of(bert, batches=halves)
    for name in whole:
        assert whole[name].losses == pytest.approx(padded[name].losses, rel=1e-4)
        assert once[name].losses == pytest.approx(twice[name].losses, rel=1e-4)


def test_the_promise_is_kept_by_the_units_that_matter_least(bert, monkeypatch):
    Paper().install(monkeypatch)
    step = Optin(speedups=(1.3, 2.0), samples=12, groups=5)
    assert (step.prior, step.branches) == ("loss", ("1.3x", "2x"))
    curves, fit = step.curves(bert, list(bert.layout.axes.values()))
    assert fit is None
    for speedup, result in zip(step.speedups, step.run(bert), strict=True):
        figures = json.loads(json.dumps(result.figures))
        assert figures["met"]
        assert figures["measured"] >= speedup
        for name, kept in result.kept.items():
            assert kept == curves[name].kept(len(kept))


def test_states_that_are_no_numbers_are_refused(bert):
    bert.model.get_submodule("encoder.layer.0.output.dense").weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"masking 'encoder.layer.0.heads' changes is not finite"):
        curves_of(bert)


def test_a_decoder_is_not_masked_as_the_encoder_is(tmp_path):
    state = state_of(TINY["t5"], tmp_path)
    batch = {**batch_of(state), "attention_mask": torch.ones(6, 9, dtype=torch.long)}
    batch |= {"decoder_input_ids": batch["input_ids"].flip(1)}
    batch["attention_mask"][:, 4:] = 0
    axis = state.layout.axes["decoder.block.1.columns"]
    with torch.no_grad():
        dense = Dense(state.model, state.layout, batch)
        state.layout.silence(state.model, axis.name, range(axis.units))
        p, q = dense.answer.logits.log_softmax(-1), state.model(**batch).logits.log_softmax(-1)
        assert dense.stray(axis.block) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
