"""Dropping blocks: the scores, what each removes, how much of it, and that the rest is what it was."""

from __future__ import annotations

import json
from itertools import product
from math import pi

import pytest
import torch
from pydantic import ValidationError

import compress.measure
from compress import checkpoint
from compress.contract import TEACHER, Part
from compress.errors import DataError, LayoutError
from compress.measure import Ratio
from compress.plan import Plan
from compress.tasks import TASKS
from passes.pruning.depth.drop_blocks import DropBlocks
from passes.pruning.depth.removal import by_angle, by_influence, by_loss, candidates, likelihood, removed, without
from passes.pruning.depth.scores import angular_distances, greedily, influence, nearest_range
from passes.pruning.widths.sensitivity import HIDDEN, relative_error
from passes.watch import first_of, last_of
from tests.conftest import GENERATING, TINY, assert_one_model, precise
from tests.paper import Paper, state_of

STACKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "vit": "vit.layers",
    "t5": "encoder.block",
    "whisper": "model.decoder.layers",
}  # families whose norms stand inside the residual branches, so that a block can change nothing
SCORES = {
    "angular": by_angle,
    "influence": lambda *given: by_influence(*given, first_token=True),
    "greedy": by_loss,
}


def state_with(name, folder, blocks=4):
    """A state of a tiny model with so many blocks in each stack."""
    tiny = TINY[name]
    known = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
    known += ("encoder_layers", "decoder_layers")
    longer = {entry: blocks for entry in known if entry in tiny.entries}
    entries = {key: value for key, value in tiny.entries.items() if key != "layer_types"}
    return state_of(type(tiny)(tiny.auto, tiny.kind, {**entries, **longer}, tiny.inputs, tiny.attentions), folder)


def batches_of(state, rows=8):
    return [{name: value[-rows:] for name, value in state.data.tensors.items()}]


def make_identity_(state, stack, index):
    """Zero all that a block adds to its input."""
    for axis in state.layout.axes.values():
        for site in axis.readers:
            if site.module.startswith(f"{stack}.{index}."):
                for parameter in state.model.get_submodule(site.module).parameters():
                    parameter.data.zero_()


# The scores as numbers


@pytest.mark.parametrize(
    ("after", "expected"), [([2.0, 0], 0.0), ([0, 3.0], 1.0), ([-1.0, 0], 2.0), ([1.0, 1.0], 1 - 0.5**0.5)]
)
def test_influence_is_one_minus_the_cosine(after, expected):
    found = influence(torch.tensor([[1.0, 0.0]]), torch.tensor([after]))
    assert found.tolist() == pytest.approx([expected])


@pytest.mark.parametrize(("turn", "expected"), [(0, 0.0), (pi / 2, 0.5), (pi, 1.0), (1e-5, 1e-5 / pi)])
def test_angles_are_in_half_turns_even_the_smallest(turn, expected):
    other = torch.tensor([torch.cos(torch.tensor(turn)), torch.sin(torch.tensor(turn))])
    states = torch.stack([torch.tensor([[1.0, 0.0]]), 7 * other[None]])
    assert angular_distances(states)[0, 1] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_angles_are_averaged_over_samples_and_alike_both_ways():
    states = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    found = angular_distances(states)
    for one, other in product(range(5), repeat=2):
        cosines = torch.cosine_similarity(states[one], states[other], dim=-1).clamp(-1, 1)
        assert found[one, other] == pytest.approx(float(cosines.acos().mean() / pi), abs=1e-3)
    assert torch.equal(found.diagonal(), torch.zeros(5))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_nearest_range_is_that_of_brute_force(length):
    distances = torch.rand(7, 7, generator=torch.Generator().manual_seed(length))
    distance, start = nearest_range(distances, length, 1, 5)
    found = {begin: float(distances[begin, begin + length]) for begin in range(1, 5 - length + 1)}
    assert start == min(found, key=found.__getitem__)
    assert distance == found[start]


def test_greed_weighs_anew_after_each_removal():
    """Two parts that do the same: either can go for nothing, but not both."""

    def loss(gone):
        return 5.0 * ({"a", "b"} <= gone) + 1.0 * ("c" in gone) + 0.5 * ("b" in gone)

    def losses(gone, left):
        return {part: loss({*gone, part}) for part in left}

    assert list(greedily(["b", "a", "c"], losses)) == [("a", 0.0), ("c", 1.0), ("b", 6.5)]


@pytest.mark.parametrize(
    ("mask", "first", "last"),
    [([1, 1, 1, 1], 0, 3), ([1, 1, 0, 0], 0, 1), ([0, 0, 1, 1], 2, 3), ([0, 1, 1, 0], 1, 2)],
)
def test_first_and_last_real_token_under_any_padding(mask, first, last):
    mask = torch.tensor([mask]).bool()
    assert first_of(mask).nonzero().tolist() == [[0, first]]
    assert last_of(mask).tolist() == [last]


# The scores on models


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", STACKS)
def test_a_block_that_adds_nothing_goes_first_and_changes_nothing(name, score, tmp_path):
    state = state_with(name, tmp_path)
    make_identity_(state, STACKS[name], 2)
    before = precise(state.model, TINY[name].example())
    gone, scores = SCORES[score](
        state, candidates(state.layout, "blocks", keep_first=1, keep_last=1), batches_of(state)
    )(1)
    assert gone == [f"{STACKS[name]}.2"]
    assert scores == [0.0]
    shallower = removed(state, gone)
    torch.testing.assert_close(precise(shallower.model, TINY[name].example()), before, rtol=1e-9, atol=1e-9)
    if name in GENERATING:
        inputs = {key: value[:1] for key, value in TINY[name].example().items() if not key.startswith("decoder")}
        words = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        cached, uncached = (shallower.model.generate(**inputs, **words, use_cache=use) for use in (True, False))
        assert torch.equal(cached, uncached)


def test_a_range_passes_over_a_block_that_adds_nothing(tmp_path):
    state = state_with("llama", tmp_path, blocks=6)
    make_identity_(state, "model.layers", 3)
    parts, batches = candidates(state.layout, "blocks", 0, 0), batches_of(state)
    whole, shallower = by_angle(state, parts, batches), removed(state, ["model.layers.3"])
    over = by_angle(shallower, candidates(shallower.layout, "blocks", 0, 0), batches)
    assert whole(6)[1] == pytest.approx(over(5)[1], abs=1e-6)


@pytest.mark.parametrize("first_token", [True, False])
def test_influence_is_that_of_the_hidden_states(first_token, tmp_path):
    state = state_with("gpt2", tmp_path)
    parts, (batch,) = candidates(state.layout, "blocks", 0, 0), batches_of(state)
    gone, scores = by_influence(state, parts, [batch], first_token)(4)
    mask = batch["attention_mask"].bool()
    mask[:, 0] = first_token
    with torch.no_grad():
        states = state.model(**batch, output_hidden_states=True).hidden_states
    found = dict(zip(gone, scores, strict=True))
    for index in range(3):  # the last of these hidden states stands after the final norm
        cosine = torch.cosine_similarity(states[index], states[index + 1], dim=-1)[mask].mean()
        assert found[f"transformer.h.{index}"] == pytest.approx(1 - float(cosine), abs=1e-5)
    assert scores == sorted(scores)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_padding_has_no_say(name, score, tmp_path):
    state = state_with(name, tmp_path)
    (batch,) = batches_of(state)
    mask = batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    mask[::2, -3:] = 0
    other = {**batch, "input_ids": torch.where(mask.bool(), batch["input_ids"], 51 - batch["input_ids"])}
    parts = candidates(state.layout, "blocks", 1, 0)
    (gone, scores), (same, near) = (SCORES[score](state, parts, [one])(2) for one in (batch, other))
    assert gone == same
    assert scores == pytest.approx(near, rel=1e-4)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("parts", ["blocks", "sub-blocks"])
def test_removed_equals_without(name, parts, tmp_path):
    state = state_of(TINY[name], tmp_path)
    names, inputs = candidates(state.layout, parts, 1, 0), TINY[name].example()
    whole = precise(state.model, inputs)
    for gone in (names[:1], names[1:]):
        with without(state.model, state.layout, gone):
            expected = precise(state.model, inputs)
        shallower = removed(state, gone).model
        torch.testing.assert_close(precise(shallower, inputs), expected, rtol=1e-9, atol=1e-9)
        assert (expected - whole).abs().max() > 1e-4 or not gone
    assert torch.equal(precise(state.model, inputs), whole)


def test_greed_on_a_language_model_is_by_likelihood(tmp_path):
    state = state_with("llama", tmp_path)
    (batch,) = batches_of(state)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batches = [{**batch, "labels": labels}]
    parts = candidates(state.layout, "blocks", 1, 1)
    found = {}
    for part in parts:
        with torch.no_grad(), without(state.model, state.layout, [part]):
            found[part] = float(state.model(**batches[0]).loss)
            loss, tokens = likelihood(state.model, batches[0], 1)
            assert loss / tokens == pytest.approx(found[part], rel=1e-5)
    gone, scores = by_loss(state, parts, batches)(1)
    assert gone == [min(found, key=found.__getitem__)]
    assert scores == pytest.approx([min(found.values())])


def test_a_masked_language_model_is_judged_at_its_labels(tmp_path):
    state = state_with("roberta", tmp_path)
    state.task = TASKS["fill-mask"]
    (batch,) = batches_of(state)
    labels = torch.where(torch.arange(9) % 4 == 1, batch["input_ids"], -100)
    with torch.no_grad():
        expected = float(state.model(**batch, labels=labels).loss)
        loss, tokens = likelihood(state.model, {**batch, "labels": labels}, 0)
        assert loss / tokens == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("parts", ["blocks", "sub-blocks"])
@pytest.mark.parametrize("name", TINY)
def test_greed_finds_what_whole_runs_find(name, parts, tmp_path):
    state = state_of(TINY[name], tmp_path)
    names, batches = candidates(state.layout, parts, 1, 0)[:4], batches_of(state)
    dense, gone = HIDDEN.read(state.model, batches[0]), []

    def loss(part):
        with torch.no_grad(), without(state.model, state.layout, [*gone, part]):
            return float(relative_error(HIDDEN.read(state.model, batches[0]), dense).mean())

    found, scores = by_loss(state, names, batches)(len(names))
    for part, score in zip(found, scores, strict=True):
        losses = {one: loss(one) for one in names if one not in gone}
        assert score == pytest.approx(losses[part], rel=1e-3, abs=1e-7)
        assert losses[part] <= min(losses.values()) * 1.001 + 1e-7
        gone.append(part)


# What may go


@pytest.mark.parametrize(
    ("name", "parts", "first", "last", "expected"),
    [
        ("bert", "blocks", 1, 1, ["encoder.layer.1"]),
        ("bert", "blocks", 0, 2, ["encoder.layer.0"]),
        ("bert", "sub-blocks", 1, 1, ["encoder.layer.1.heads", "encoder.layer.1.columns"]),
        ("t5", "blocks", 0, 0, ["encoder.block.1", "encoder.block.2", "decoder.block.1"]),
        ("t5", "sub-blocks", 0, 1, ["encoder.block.1.columns"]),  # heads stay: all blocks share their table
        ("llama", "sub-blocks", 0, 2, ["model.layers.0.columns"]),  # its heads tell how long the cache is
    ],
)
def test_only_what_the_model_can_do_without_is_a_candidate(name, parts, first, last, expected, tmp_path):
    assert candidates(state_of(TINY[name], tmp_path).layout, parts, first, last) == expected


@pytest.mark.parametrize(
    ("options", "blocks", "count"),
    [
        ({"remove": 2}, 4, 2),
        ({"share": 0.5}, 4, 2),
        ({"share": 0.3, "keep_first": 0}, 6, 2),
        ({"share": 0.25, "parts": "sub-blocks"}, 4, 2),
        ({"remove": 3, "score": "angular"}, 5, 3),
    ],
)
def test_as_many_go_as_asked(options, blocks, count, tmp_path):
    state = state_with("bert", tmp_path, blocks)
    score = {"score": "influence", **options}
    (result,) = DropBlocks(**score, samples=8).run(state)
    figures = json.loads(json.dumps(result.figures))
    assert len(figures["removed"]) == count
    if options.get("parts") == "sub-blocks":
        gone = [name for name, axis in result.layout.axes.items() if not axis.units]
        assert sorted(gone) == sorted(figures["removed"])
        assert all(result.kept[name] == [] for name in gone)
    else:
        assert result.layout.stacks["encoder.layer"].length == blocks - count
    if options.get("score") == "angular":
        assert figures["removed"] == [f"encoder.layer.{index}" for index in (1, 2, 3)]


def test_names_stay_those_of_the_dense_model(tmp_path):
    state = state_with("llama", tmp_path, blocks=5)
    state.cut("model.layers.3.columns", range(7))
    state.cut("model.layers.1.columns", range(9))
    state.drop("model.layers", [0, 2, 3, 4])
    assert state.kept == {"model.layers.3.columns": list(range(7))}
    state.cut("model.layers.2.columns", [6, 1])
    assert state.kept == {"model.layers.3.columns": [1, 6]}
    (result,) = DropBlocks(remove=2, score="angular", samples=8).run(state)
    assert result.figures["removed"] == ["model.layers.2", "model.layers.3"]
    assert result.kept == {}
    assert state.layout.stacks["model.layers"].length == 4
    checkpoint.save(result.model, tmp_path / "saved")
    loaded, _ = checkpoint.load(tmp_path / "saved", state.task)
    assert_one_model(loaded, result.model, TINY["llama"].example())


# The promise


@pytest.mark.parametrize("score", SCORES)
def test_the_fewest_removals_that_keep_each_promise(score, tmp_path, monkeypatch):
    Paper().install(monkeypatch)
    state = state_with("bert", tmp_path, blocks=6)
    step = DropBlocks(speedups=(1.0, 1.3, 2.0), score=score, samples=8)
    assert step.branches == ("1x", "1.3x", "2x")
    dense, block = 3.0 + 6 * 5.9, 5.9
    for speedup, result in zip(step.speedups, step.run(state), strict=True):
        figures = json.loads(json.dumps(result.figures))
        count = next(count for count in range(6) if dense / (dense - count * block) >= speedup)
        assert result.layout.stacks["encoder.layer"].length == 6 - count
        assert len(figures["removed"]) == count
        assert (figures["promised"], figures["met"], figures["warnings"]) == (speedup, True, [])
        assert figures["measured"] == pytest.approx(dense / (dense - count * block))
        assert {"dense_milliseconds", "low", "high"} <= figures.keys()
        assert {"count", "measured", "low", "high"} <= figures["attempts"][0].keys()


def test_a_promise_that_noise_may_have_broken_is_told_as_missed(tmp_path, monkeypatch):
    Paper().install(monkeypatch)
    plain = compress.measure.speedup
    monkeypatch.setattr(compress.measure, "speedup", lambda *both: Ratio(plain(*both).value, 0.5, 4.0))
    (result,) = DropBlocks(speedups=(3.0,), samples=8).run(state_with("bert", tmp_path))
    assert result.figures["met"] is False
    assert result.layout.stacks["encoder.layer"].length == 2
    (warning,) = result.figures["warnings"]
    assert "3x was promised" in warning


def test_sub_blocks_are_finer_than_blocks(tmp_path, monkeypatch):
    Paper().install(monkeypatch)
    state = state_with("llama", tmp_path)
    results = [
        next(DropBlocks(speedups=(1.15,), parts=parts, samples=8).run(state)) for parts in ("blocks", "sub-blocks")
    ]
    assert 1.15 <= results[1].figures["measured"] < results[0].figures["measured"]


# The contract


def test_contracts():
    assert DropBlocks(remove=1).requires == frozenset()
    assert DropBlocks(speedups=(2,)).requires == {TEACHER}
    assert DropBlocks(speedups=(2,)).branches == DropBlocks(remove=1).branches == ("",)
    assert DropBlocks(remove=1).touches == Part.SHAPE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing says how much; expected remove, share or speedups"),
        ({"remove": 1, "share": 0.5}, "remove and share says how much"),
        ({"remove": 0}, "greater than or equal to 1"),
        ({"share": 1.0}, "less than 1"),
        ({"speedups": (2, 2)}, "2 is listed more than once"),
        ({"speedups": ()}, "at least 1 item"),
        ({"remove": 1, "score": "angular", "parts": "sub-blocks"}, "expected parts: blocks"),
        ({"remove": 1, "keep_first": 0, "keep_last": 0}, "expected a block that stays"),
    ],
)
def test_wrong_options_are_told(options, said):
    with pytest.raises(ValidationError, match=said):
        DropBlocks(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remove": 2}, "remove 2 is 2 blocks; expected 1..1"),
        ({"share": 0.1}, "share 0.1 of 3 is 0 blocks; expected 1..1"),
        ({"remove": 1, "keep_first": 3}, "no blocks can go: blocks are 3 in encoder.layer; the first 3 and the last 1"),
    ],
)
def test_an_amount_that_the_model_cannot_give_is_refused(options, said, tmp_path):
    with pytest.raises(LayoutError, match=said):
        next(DropBlocks(**options, samples=8).run(state_of(TINY["bert"], tmp_path)))


@pytest.mark.parametrize("score", SCORES)
def test_states_that_are_no_numbers_are_refused(score, tmp_path):
    state = state_of(TINY["bert"], tmp_path)
    state.model.get_submodule("encoder.layer.0.output.dense").weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite on the calibration text"):
        next(DropBlocks(remove=1, score=score, samples=8).run(state))


def test_data_without_calibration_text_are_refused(tmp_path):
    state = state_of(TINY["bert"], tmp_path)
    state.data.rows = 0
    with pytest.raises(DataError, match="calibration"):
        next(DropBlocks(remove=1).run(state))


def test_a_plan_made_in_python_names_it_as_yaml_does():
    plan = Plan(model="any", passes=[DropBlocks(remove=1)])
    assert plan.passes[0].name == "drop_blocks"
    assert plan.passes[0].written() == {"drop_blocks": {"remove": 1}}
