"""Merge: the way between two weights has its ends and its lengths, and models that are not of one make are refused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from pydantic import ValidationError

from compress.errors import LayoutError
from compress.plan import Plan, Tables
from compress.runner import Run, prepare
from passes import PASSES
from passes.merging.between import angle_between, lerp, slerp
from passes.merging.merge import Merge
from tests.conftest import TINY
from tests.paper import state_of
from tests.texts import tokenizer
from tests.world import make_world

WAYS = {"slerp": slerp, "average": lerp}
SHARES = (0.0, 0.2, 0.5, 0.9, 1.0)


def pair(seed: int = 0, scale: float = 3.0):
    torch.manual_seed(seed)
    return torch.randn(5, 7), scale * torch.randn(5, 7)


@pytest.mark.parametrize("way", WAYS.values())
@pytest.mark.parametrize("seed", range(5))
def test_the_ends_are_the_weights_themselves(way, seed):
    a, b = pair(seed)
    assert torch.equal(way(a, b, 0.0), a)
    assert torch.equal(way(a, b, 1.0), b)


@pytest.mark.parametrize("way", WAYS.values())
@pytest.mark.parametrize("t", SHARES)
def test_between_equal_weights_lies_nothing_else(way, t):
    a, _ = pair()
    assert torch.equal(way(a, a.clone(), t), a)
    assert torch.equal(way(a.bfloat16(), a.bfloat16(), t), a.bfloat16())


@pytest.mark.parametrize("way", WAYS.values())
@pytest.mark.parametrize("t", SHARES)
def test_forth_and_back_are_one_way(way, t):
    a, b = pair()
    torch.testing.assert_close(way(a, b, t), way(b, a, 1 - t))


@pytest.mark.parametrize("t", SHARES)
def test_the_length_goes_straight_and_the_angle_evenly(t):
    a, b = pair()
    point = slerp(a, b, t)
    torch.testing.assert_close(point.norm(), (1 - t) * a.norm() + t * b.norm())
    torch.testing.assert_close(angle_between(a, point), t * angle_between(a, b), atol=1e-6, rtol=1e-6)
    unit = slerp(a / a.norm(), b / b.norm(), t)
    torch.testing.assert_close(unit.norm(), torch.tensor(1.0))


def test_of_equal_lengths_it_is_the_papers_formula():
    a, b = pair()
    b = b * a.norm() / b.norm()
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    expected = torch.sin(0.7 * angle) / torch.sin(angle) * a + torch.sin(0.3 * angle) / torch.sin(angle) * b
    torch.testing.assert_close(slerp(a, b, 0.3), expected)


@pytest.mark.parametrize("other", ["zero", "opposite", "longer"])
def test_where_there_is_no_arc_it_is_the_line(other):
    a, _ = pair()
    b = {"zero": torch.zeros_like(a), "opposite": -a, "longer": 2 * a}[other]
    torch.testing.assert_close(slerp(a, b, 0.3), 0.7 * a + 0.3 * b)


def states(folder, count: int, name: str = "llama-tied", scale: float = 0.05):
    """States of one tiny model whose weights went different ways."""
    made = [state_of(TINY[name], folder) for _ in range(count)]
    for number, state in enumerate(made):
        torch.manual_seed(number)
        with torch.no_grad():
            for weight in state.model.parameters():
                weight += scale * torch.randn_like(weight)
    first, *others = made
    first.others = tuple(others)
    return first


def merged(state, **options):
    (after,) = Merge(**options).run(state)
    return dict(after.model.named_parameters())


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 2)])
def test_who_alone_counts_is_the_merged_model(tmp_path, method, weights):
    state = states(tmp_path, 3)
    whole = [copy.deepcopy(dict(one.model.named_parameters())) for one in (state, *state.others)]
    found = merged(state, method=method, weights=weights)
    chosen = whole[max(range(3), key=lambda number: weights[number])]
    assert all(torch.equal(found[name], chosen[name]) for name in chosen)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.auto != "AutoModel"][::4])
@pytest.mark.parametrize("method", WAYS)
def test_equal_models_give_the_same(tmp_path, method, name):
    state = states(tmp_path, 3, name, scale=0.0)
    before = copy.deepcopy(state.model.state_dict())
    merged(state, method=method)
    assert all(torch.equal(one, before[key]) for key, one in state.model.state_dict().items())
    assert state.figures == {
        "models": 3,
        "degrees": {"mean": pytest.approx(0, abs=1e-4), "most": pytest.approx(0, abs=1e-4)},
    }


def test_an_average_is_the_weighted_mean(tmp_path):
    state = states(tmp_path, 3)
    weights = [copy.deepcopy(dict(one.model.named_parameters())) for one in (state, *state.others)]
    found = merged(state, method="average", weights=(1, 2, 5))
    for name, weight in found.items():
        mean = (weights[0][name] + 2 * weights[1][name] + 5 * weights[2][name]) / 8
        torch.testing.assert_close(weight, mean, atol=1e-5, rtol=1e-5)


def test_of_two_models_each_weight_lies_on_its_arc_and_ties_stay(tmp_path):
    state = states(tmp_path, 2)
    weights = [copy.deepcopy(dict(one.model.named_parameters())) for one in (state, *state.others)]
    found = merged(state, weights=(3, 1))
    assert all(torch.equal(found[name], slerp(weights[0][name], weights[1][name], 0.25)) for name in found)
    assert state.model.lm_head.weight is state.model.model.embed_tokens.weight
    assert 0 < state.figures["degrees"]["mean"] <= state.figures["degrees"]["most"] < 90


def test_order_matters_little_where_models_are_near(tmp_path):
    found = []
    for order in itertools.permutations(range(3)):
        state = states(tmp_path, 3, scale=0.01)
        every = [state, *state.others]
        first, *others = (every[number] for number in order)
        first.others = tuple(others)
        found.append(copy.deepcopy(merged(first)))
    for other in found[1:]:
        for name in other:
            torch.testing.assert_close(found[0][name], other[name], atol=2e-3, rtol=1e-2)


def narrow(state):
    state.cut("model.layers.0.columns", range(20))


def shift(state):
    state.cut("model.layers.0.columns", range(9, 29))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            None,
            narrow,
            r"'model.layers.0.mlp.gate_proj.weight' is \(29, 24\) in the first model and \(20, 24\) in number 2",
        ),
        (narrow, shift, r"of 'model.layers.0.columns' other units are left in model number 2"),
        (
            lambda state: state.drop("model.layers", [0, 1]),
            lambda state: state.drop("model.layers", [0, 2]),
            "the blocks",
        ),
        (None, lambda state: state.drop("model.layers", [0, 1]), r"'model.layers.2.*' is .* and absent from number 2"),
        (None, lambda state: setattr(state, "tokenizer", tokenizer()), "has other tokens"),
    ],
)
def test_models_of_another_make_are_refused(tmp_path, first, second, message):
    state = states(tmp_path, 2)
    for change, one in ((first, state), (second, state.others[0])):
        if change:
            change(one)
    with pytest.raises(LayoutError, match=message):
        merged(state)


@pytest.mark.parametrize("weights", [(), (0, 0), (1, -1)])
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(ValidationError, match="one of them above 0"):
        Merge(weights=weights)


def plan_of(world, *passes):
    values = {"model": str(world / "my-encoder"), "data": {"source": str(world / "reviews.txt")}}
    return Plan.read({**values, "passes": list(passes), "export": []}, Tables(PASSES, {}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((TRAIN := {"distill": {"steps": 1}}, "merge"), "follows 1 step, but merge takes two or more models"),
        (("merge",), "follows 1 step, but merge takes two or more models"),
        (
            ({**TRAIN, "id": "a"}, {**TRAIN, "id": "b", "after": []}, {"merge": {"weights": [1]}, "after": ["a", "b"]}),
            "follows 2 steps, but merge has 1 weights; expected one for each",
        ),
    ],
)
def test_a_plan_tells_how_many_models_are_merged(world, passes, message):
    (told,) = plan_of(world, *passes).check()
    assert message in told


def test_a_run_merges_what_two_recipes_made(world, tmp_path):
    train = {"steps": 2, "learning_rate": 0.0005, "precision": "float32"}
    passes = (
        {"drop_blocks": {"remove": 1, "samples": 8, "keep_last": 0}},
        {"distill": train, "id": "a"},
        {"distill": {**train, "seed": 1}, "id": "b", "after": "drop_blocks"},
        {"merge": {"weights": [1, 3]}, "after": ["a", "b"]},
    )
    run = Run(plan_of(world, *passes), prepare(tmp_path / "out", fresh=False))
    (leaf,) = run.go()
    one, other = (dict(run.state(parent).model.named_parameters()) for parent in leaf.parents)
    found = dict(run.state(leaf).model.named_parameters())
    assert all(torch.equal(found[name], slerp(one[name], other[name], 0.75)) for name in found)
    assert any(not torch.equal(found[name], one[name]) for name in found)
