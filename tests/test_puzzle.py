"""Puzzle: the program against brute force, the variants against what they replace, and the budgets that are kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compress import checkpoint
from compress.errors import DataError, LayoutError, ReachError
from compress.families import layout_of
from compress.latency import Curve, Table
from compress.linear import linearise
from compress.record import record_of
from passes import PASSES, watch
from passes.pruning.amounts import counted
from passes.pruning.replace.local import Local, examples_of, fit_linear, library, normalised_error
from passes.pruning.replace.mip import choose
from passes.pruning.replace.replacement import cached_tokens, distance, milliseconds, replacement_scores, with_one
from passes.pruning.replace.variants import Variant, contributions, importance, offered, place_, twin
from tests.conftest import TINY, answer, assert_one_model, precise
from tests.paper import EVERYTHING, PER_UNIT, Paper, state_of

FEW = {"attention": [0.5, "linear", "none"], "ffn": [0.5, "linear", "none"], "samples": 16}


@pytest.fixture
def state(request, tmp_path):
    return state_of(TINY[getattr(request, "param", "llama")], tmp_path)


def brute_force(scores, resources, limits, previous, alpha):
    """The least score of all choices that keep every limit; None where there is no such choice."""

    def fits(choice):
        def total(table):
            return sum(row[index] for row, index in zip(table, choice, strict=True))

        alike = [sum(one == other for one, other in zip(choice, before, strict=True)) for before in previous]
        return all(total(resources[name]) <= limit for name, limit in limits.items()) and all(
            count <= alpha * len(scores) for count in alike
        )

    every = itertools.product(*(range(len(row)) for row in scores))
    found = [sum(row[i] for row, i in zip(scores, choice, strict=True)) for choice in every if fits(choice)]
    return min(found, default=None)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
@pytest.mark.parametrize("seed", range(8))
def test_the_program_equals_brute_force(names, seed):
    random = np.random.default_rng(seed)
    widths = random.integers(1, 5, size=5)
    scores = [random.random(width) for width in widths]
    resources = {name: [random.random(width) - 0.1 for width in widths] for name in names}
    limits = {name: float(random.uniform(0.2, 0.7)) * len(widths) for name in names}
    previous = []
    for _ in range(3):
        least = brute_force(scores, resources, limits, previous, 0.6)
        if least is None:
            with pytest.raises(ReachError):
                choose(scores, resources, limits, previous, 0.6)
            return
        choice = choose(scores, resources, limits, previous, 0.6)
        assert sum(row[i] for row, i in zip(scores, choice, strict=True)) == pytest.approx(least)
        for name, limit in limits.items():
            assert sum(row[i] for row, i in zip(resources[name], choice, strict=True)) <= limit + 1e-6
        previous.append(choice)


@pytest.mark.parametrize(
    ("limits", "previous", "message"),
    [
        ({"a": 1.9}, [], "a: 1.9 at most was asked; the least that any choice takes is 2"),
        ({"a": 2.0, "b": 2.0}, [], "no choice of variants meets all of: a at most 2, b at most 2"),
        ({"a": 2.0}, [[0, 0]], "no choice of variants that differs from 1 others"),
    ],
)
def test_budgets_that_cannot_be_met_say_which(limits, previous, message):
    rows = [np.array([1.0, 2.0])] * 2
    with pytest.raises(ReachError, match=message):
        choose(rows, {"a": rows, "b": [row[::-1] for row in rows]}, limits, previous, 0.5)


def test_the_contribution_of_a_unit_is_what_its_removal_changes():
    weight, inputs = torch.randn(5, 12), torch.randn(7, 12)
    for width in (1, 3):
        found = contributions(weight, inputs, width)
        for unit, mine in enumerate(found):
            without = weight.clone()
            without[:, unit * width : (unit + 1) * width] = 0
            torch.testing.assert_close(mine, (inputs @ (weight - without).T).norm(dim=1).sum())
    columns = inputs.abs().sum(0) * weight.norm(dim=0)
    torch.testing.assert_close(contributions(weight, inputs, 1), columns)


def test_a_unit_that_is_never_active_goes_first(state):
    axis = state.layout.axes["model.layers.1.columns"]
    with torch.no_grad():
        up = state.model.model.layers[1].mlp.up_proj
        up.weight[4], up.bias[4] = 0, 0
    weights = importance(state, [axis], list(state.data.batches("calibration", 20)))[axis.name]
    assert weights[4] == 0
    variants, _ = offered(axis, [0.95], weights)
    assert 4 not in variants[0].keep


@pytest.mark.parametrize("name", TINY)
def test_a_linear_at_zero_equals_no_units_and_a_filled_one_loads_as_it_was(name, tmp_path):
    tiny = TINY[name]
    zero, none, layout = tiny.build(), tiny.build(), layout_of(tiny.build())
    after = layout
    for axis in [axis for axis in layout.axes.values() if axis.bypass and not axis.least]:
        after = linearise(zero, after, axis.name)
        layout.cut(none, axis.name, [])
        with pytest.raises(LayoutError, match="has no units left"):
            linearise(zero, after, axis.name)
    torch.testing.assert_close(precise(zero, tiny.example()), precise(none, tiny.example()), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for axis in after.axes.values():
            for site in axis.readers if not axis.units else ():
                zero.get_submodule(site.module).weight.normal_()
    assert (answer(zero, tiny.example()) - answer(none, tiny.example())).abs().max() > 1e-3
    checkpoint.save(zero, tmp_path / "model")
    loaded = type(zero).from_pretrained(tmp_path / "model").eval()
    assert_one_model(loaded, zero, tiny.example())
    assert layout_of(loaded) == after == layout_of(zero)
    assert record_of(loaded.config) == record_of(zero.config)


def test_a_linear_is_renamed_with_its_block(tmp_path):
    model = TINY["llama"].build()
    layout = linearise(model, layout_of(model), "model.layers.2.columns")
    layout = linearise(model, layout, "model.layers.1.heads")
    layout = layout.drop(model, "model.layers", [0, 2])
    assert record_of(model.config)["linear"] == ["layers.1.columns"]
    checkpoint.save(model, tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    assert_one_model(loaded, model, TINY["llama"].example())
    assert layout_of(loaded) == layout


def test_a_linear_across_what_blocks_share_is_refused():
    model = TINY["t5"].build()
    with pytest.raises(LayoutError, match="needs at least 1 of its 3 units"):
        linearise(model, layout_of(model), "encoder.heads")


def local(state, axis, steps=0, rows=None):
    batches = list(state.data.batches("calibration", 10))
    if rows is not None:
        batches = [{name: value[:, :rows] for name, value in batch.items()} for batch in batches]
    axis = state.layout.axes[axis]
    return Local(state, examples_of(state.model, [axis], batches), steps, 1e-2), axis


BLOCKS = {"bert": "encoder.layer.1", "llama": "model.layers.1", "gpt2": "transformer.h.1"}


@pytest.mark.parametrize("kind", ["heads", "columns"])
@pytest.mark.parametrize("state", BLOCKS, indirect=True)
def test_local_losses(state, kind, request):
    name = f"{BLOCKS[request.node.callspec.params['state']]}.{kind}"
    before = answer(state.model, state.data.tensors)
    teach, axis = local(state, name)
    units = tuple(range(axis.units))
    assert teach.fitted(axis, Variant("whole", units))[1] == pytest.approx(0, abs=1e-9)
    silent = twin(state, axis.block)
    place_(silent, name, Variant("none", ()))
    reader = silent.model.get_submodule(axis.readers[0].module)
    if reader.bias is not None:
        reader.bias = torch.nn.Parameter(torch.zeros_like(reader.bias))
    with torch.no_grad():
        assert teach.loss(silent.model, axis) == pytest.approx(1)
    taught, _ = local(state, name, steps=10)
    one, linear = Variant("one", units[:1]), Variant("linear", (), linear=True)
    assert taught.fitted(axis, one)[1] < teach.fitted(axis, one)[1]
    assert taught.fitted(axis, linear)[1] <= teach.fitted(axis, linear)[1] < 1
    assert torch.equal(answer(state.model, state.data.tensors), before), "the parent must stay as it was"


@pytest.mark.parametrize("state", ["llama"], indirect=True)
def test_attention_to_one_token_is_its_values_times_its_outputs(state):
    teach, axis = local(state, "model.layers.1.heads", rows=1)
    attention = state.model.model.layers[1].self_attn
    values = attention.v_proj.weight.unflatten(0, (3, -1)).repeat_interleave(2, 0).flatten(0, 1)
    bias = attention.v_proj.bias.unflatten(0, (3, -1)).repeat_interleave(2, 0).flatten()
    output = attention.o_proj
    child = twin(state, axis.block)
    exact = {
        "model.layers.1.self_attn.o_proj.weight": output.weight.detach() @ values.detach(),
        "model.layers.1.self_attn.o_proj.bias": (output.weight @ bias + output.bias).detach(),
    }
    place_(child, axis.name, Variant("linear", (), linear=True, weights=exact))
    with torch.no_grad():
        assert teach.loss(child.model, axis) == pytest.approx(0, abs=1e-9)
    assert teach.fitted(axis, Variant("linear", (), linear=True))[1] < 0.05


def test_the_fit_finds_a_linear_map():
    inputs, weight, bias = torch.randn(200, 6), torch.randn(4, 6), torch.randn(4)
    found = fit_linear(inputs, inputs @ weight.T + bias, damping=1e-9)
    torch.testing.assert_close(found, (weight, bias), rtol=1e-4, atol=1e-5)
    assert normalised_error(torch.zeros(3, 2), torch.ones(3, 2)) == 1


@pytest.mark.parametrize("state", ["llama", "bert", "bert-classifier"], indirect=True)
def test_the_parent_scores_nothing_and_others_something(state):
    batch = next(iter(state.data.batches("calibration", 16)))
    made = library(state, {"heads": (0.5, "none"), "columns": (0.5, "none")}, [batch], 0, 1e-3)
    scores = replacement_scores(state, made.variants, [batch])
    for name, row in scores.items():
        assert row[-1] == 0
        assert (row[:-1] > 0).all(), name
        for variant, score in zip(made.variants[name], row, strict=True):
            with torch.no_grad():
                runs = [watch.answer(model, batch) for model in (state.model, with_one(state, name, variant))]
            assert score == pytest.approx(distance(*runs, batch), rel=1e-4, abs=1e-8)
    whole = [variants[-1] for variants in made.variants.values()]
    assert all(variant.name == "whole" for variant in whole)


def test_variants_are_scored_by_texts_they_were_not_made_from(state, monkeypatch):
    met = {}

    def spy(name, function):
        def called(state, first, batches, *rest):
            met[name] = batches
            return function(state, first, batches, *rest)

        return called

    monkeypatch.setattr("passes.pruning.replace.local.library", spy("made", library))
    monkeypatch.setattr("passes.pruning.replace.replacement.replacement_scores", spy("scored", replacement_scores))
    list(PASSES["puzzle"](**{**FEW, "samples": 24}, parameters=0.9).run(state))
    rows = {name: {tuple(row.tolist()) for batch in met[name] for row in batch["input_ids"]} for name in met}
    assert [len(rows[name]) for name in ("made", "scored")] == [16, 8]
    assert not rows["made"] & rows["scored"]
    state.data.rows = 1
    with pytest.raises(DataError, match="expected two"):
        list(PASSES["puzzle"](**FEW, parameters=0.9).run(state))


@pytest.mark.parametrize("share", [0.9, 0.75, 0.5])
def test_shares_of_parameters_and_cache_are_kept(state, share):
    (out,) = PASSES["puzzle"](**FEW, parameters=share, memory=0.7).run(state)
    kept = counted(out.model) / counted(state.model)
    assert out.figures["kept"]["parameters"] == pytest.approx(kept)
    assert kept <= share
    heads = [axis.units for axis in out.layout.axes.values() if axis.kind == "heads"]
    assert out.figures["kept"]["memory"] == pytest.approx(sum(heads) / 9)
    assert sum(heads) / 9 <= 0.7
    assert "model.layers.0.heads" in out.figures["skipped"]
    assert layout_of(out.model) == out.layout


def test_solutions_differ_and_the_first_is_the_best(state):
    step = PASSES["puzzle"](**FEW, parameters=0.8, solutions=3, alpha=0.5)
    assert step.branches == ("1", "2", "3")
    chosen = list(step.run(state))
    scores = [out.figures["score"] for out in chosen]
    assert scores == sorted(scores)
    for one, other in itertools.combinations(chosen, 2):
        sizes = one.figures["sizes"]
        alike = sum(other.figures["sizes"][axis] == name for axis, name in sizes.items())
        assert alike <= 0.5 * len(sizes)


@pytest.mark.parametrize("slower", [1.0, 1.2])
def test_a_speed_up_is_kept_with_the_cache_as_a_further_budget(state, monkeypatch, slower):
    Paper(slower).install(monkeypatch)
    options = {"attention": [0.5, "none"], "ffn": [0.5, "none"], "samples": 16}
    one, two = PASSES["puzzle"](**options, speedups=[1.3, 1.8], memory=0.8).run(state)
    for out, promised in ((one, 1.3), (two, 1.8)):
        assert out.figures["met"]
        assert out.figures["promised"] == promised
        assert out.figures["kept"]["memory"] <= 0.8
        units = sum(axis.units * PER_UNIT[axis.kind] for axis in out.layout.axes.values())
        whole = sum(axis.units * PER_UNIT[axis.kind] for axis in state.layout.axes.values())
        assert (EVERYTHING + whole * slower) / (EVERYTHING + units * slower) >= promised


def test_a_linear_takes_the_time_of_as_many_weights_in_columns(state):
    curves = {name: Curve.of((0, axis.units), (0.0, 1.0), ()) for name, axis in state.layout.axes.items()}
    linear = Variant("linear", (), linear=True)
    names = ("model.layers.1.heads", "model.layers.1.columns")
    times = milliseconds(Table(curves), state, {name: [linear] for name in names})
    for row in times.values():  # 24 outputs over three matrices are 8 columns of 29
        assert row == pytest.approx(8 / 29)


@pytest.mark.parametrize(
    ("state", "tokens"), [("gemma3", {5, 128}), ("llama", {128}), ("gpt2", {128})], indirect=["state"]
)
def test_a_window_bounds_the_cache(state, tokens):
    assert set(cached_tokens(state).values()) == tokens


def test_a_model_without_a_cache_has_no_budget_of_memory(tmp_path):
    with pytest.raises(LayoutError, match="memory: a model of type 'bert' keeps no key-value cache by block"):
        list(PASSES["puzzle"](**FEW, memory=0.5).run(state_of(TINY["bert"], tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no budget; expected at least one of speedups, parameters and memory"),
        ({"speedups": [2, 3], "solutions": 2}, "2 solutions of 2 speed-ups; expected one speed-up"),
        ({"speedups": [2, 2]}, "2 is listed more than once"),
        ({"parameters": 0.5, "ffn": ["half"]}, "ffn"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValidationError, match=message):
        PASSES["puzzle"](**options)
