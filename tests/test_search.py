"""Searches of sizes: better than the sums they start from, within every budget, on toys and on tiny models."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from compress.contract import STATISTICS
from compress.data.calibration import calibration
from compress.errors import ReachError
from compress.families import layout_of
from passes.pruning.calibrate import Calibrate
from passes.pruning.promise import Menu
from passes.pruning.search.best import Best
from passes.pruning.search.choice import Choice, Evolution, Spdy
from passes.pruning.search.evolution import evolve, fitted, switched
from passes.pruning.search.fitness import Fitness
from passes.pruning.search.spdy import learn_coefficients
from passes.pruning.widths.database import silence_, surgery
from passes.pruning.widths.prune import Prune
from passes.pruning.widths.sensitivity import HIDDEN, PREDICTIONS, change
from passes.pruning.widths.structured import SEARCH_BATCH
from passes.pruning.widths.ziplm import ZipLM
from tests.conftest import TINY
from tests.paper import Paper, state_of

AXES, SIZES = 5, 4


class Toy:
    """Axes whose true losses add up, and a menu whose losses are wrong by a factor an axis."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        names = [f"axis {number}" for number in range(AXES)]
        sizes = {name: list(range(SIZES)) for name in names}
        times = {name: np.sort(generator.uniform(0, 1, SIZES)) for name in names}
        self.true = {name: np.sort(generator.uniform(0, 1, SIZES))[::-1] for name in names}
        told = {name: loss * 10 ** generator.uniform(-1, 1) for name, loss in self.true.items()}
        self.menu = Menu(sizes, told, times)
        least, most = (self.menu.cost(dict.fromkeys(names, level)) for level in (0, SIZES - 1))
        self.budget = least + generator.uniform(0.3, 0.7) * (most - least)
        self.judged: list[dict[str, int]] = []

    def loss(self, sizes, share: float = 1.0) -> float:
        self.judged.append(dict(sizes))
        return sum(float(self.true[name][size]) for name, size in sizes.items())

    def best(self) -> float:
        every = (dict(zip(self.true, levels, strict=True)) for levels in itertools.product(range(SIZES), repeat=AXES))
        return min(self.loss(sizes) for sizes in every if self.menu.cost(sizes) <= self.budget)


SEARCHES = {
    "spdy": lambda toy: Spdy(toy.menu, toy.menu.search, toy.loss, 100, 0),
    "evolution": lambda toy: Evolution(toy.menu, toy.menu.search, toy.loss, 60, 0),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_mends_a_wrong_prior(search):
    """What the plain sums lose more than the best there is, a search mostly wins back, and never loses more."""
    won, lost = 0.0, 0.0
    for seed in range(8):
        toy = Toy(seed)
        plain, found = toy.loss(toy.menu.search(toy.budget)), toy.loss(SEARCHES[search](toy)(toy.budget))
        best = toy.best()
        assert best <= found <= plain
        won, lost = won + plain - found, lost + plain - best
    assert lost > 0.2
    assert won > 0.8 * lost


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(4))
def test_nothing_over_the_budget_is_ever_judged_and_corrections_keep_what_was_learnt(search, seed):
    toy = Toy(seed)
    choose = SEARCHES[search](toy)
    first = choose(toy.budget)
    assert all(toy.menu.cost(sizes) <= toy.budget for sizes in toy.judged)
    work = len(toy.judged)
    toy.judged.clear()
    least = toy.menu.cost(toy.menu.fastest())
    tighter = least + 0.7 * (toy.budget - least)
    second = choose(tighter)
    assert toy.menu.cost(second) <= tighter
    assert all(toy.menu.cost(sizes) <= tighter for sizes in toy.judged)
    assert len(toy.judged) < work / 2
    assert choose(toy.budget) == first or toy.loss(choose(toy.budget)) <= toy.loss(first)
    with pytest.raises(ReachError):
        choose(least / 2)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_same_seed_finds_the_same_way(search):
    ways = [SEARCHES[search](Toy(3)) for _ in range(2)]
    found = [choose(Toy(3).budget) for choose in ways]
    assert found[0] == found[1]
    figures = [json.loads(json.dumps(choose.figures(found[0]))) for choose in ways]
    assert figures[0] == figures[1]
    (history,) = figures[0]["fitness_history"]
    assert [fitness for _, fitness in history] == sorted((fitness for _, fitness in history), reverse=True)
    assert history[-1][1] == figures[0]["fitness"]


def test_spdy_begins_with_the_program_as_it_is_and_draws_between_0_and_1():
    asked = []
    best = learn_coefficients(lambda c: asked.append(c) or c, lambda c: float(((c - 0.25) ** 2).sum()), 20, 50, 0)
    assert (asked[0] == 1).all()
    assert all((c >= 0).all() and (c <= 1).all() for c in asked)
    assert best.tried == len(asked)
    assert best.fitness < min(float(((c - 0.25) ** 2).sum()) for c in asked[:51])
    moved = [(now != before).sum() for before, now in itertools.pairwise(asked[51:])]
    assert max(moved) <= 4  # two drawn anew, over one drawn anew before


def test_evolution_judges_ever_fewer_by_ever_more():
    judged = []
    evolve((3, 0, 3, 0), [np.arange(7.0)] * 4, 9.0, lambda levels, share: judged.append(share) or 1.0, 20, 8, 0)
    assert judged[0] == 1
    assert set(judged) >= {1.0, 1 / 2, 1 / 4}
    assert judged.count(1.0) == 21
    assert all(later >= before or before == 1 for before, later in itertools.pairwise(judged))


def test_children_fit_and_use_what_is_left():
    generator = np.random.default_rng(0)
    times = [np.arange(6.0)] * 5
    parent = fitted((5, 5, 5, 5, 5), times, 12.0, generator)
    assert sum(parent) == 12
    children = {switched(parent, times, 12.0, generator) for _ in range(200)}
    assert all(sum(child) == 12 for child in children)
    assert len(children) > 20
    assert fitted((1, 1), [np.array([1.0, 2.0])] * 2, 1.5, generator) is None


def test_best_takes_only_what_is_better():
    best = Best("first", 1.0)
    assert not best.offer("as good", 1.0)
    assert not best.offer("unknown", float("nan"))
    assert best.offer("better", 0.5)
    assert (best.value, best.tried, best.history) == ("better", 4, [(1, 1.0), (4, 0.5)])


# Stitched models


@pytest.mark.parametrize(
    ("name", "output"), [("bert", HIDDEN), ("gpt2", PREDICTIONS), ("llama", PREDICTIONS), ("t5", HIDDEN)]
)
def test_a_stitched_model_is_the_silenced_and_refitted_one(name, output, tmp_path):
    state = state_of(TINY[name], tmp_path)
    curves, fit = surgery(state, list(state.layout.axes.values()), 0.01)
    batches = list(calibration(state.data, 40, SEARCH_BATCH))
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    fitness = Fitness(state.model, state.layout, curves, fit, batches, output)
    full = {axis.name: axis.units for axis in state.layout.axes.values()}
    halves = {axis.name: max(axis.least, axis.units // 2) for axis in state.layout.axes.values()}
    assert fitness(full) == pytest.approx(0, abs=1e-9)
    for sizes in (halves, {**halves, next(iter(full)): full[next(iter(full))]}):
        silenced = TINY[name].build()
        for axis, size in sizes.items():
            silence_(silenced, state.layout, axis, curves[axis].kept(size), fit)
        with torch.no_grad():
            now, then = ([output.read(model, batch) for batch in batches] for model in (silenced, state.model))
            expected = change(now, then, output.distance)
        assert fitness(sizes) == pytest.approx(expected, rel=1e-4, abs=1e-7)  # what float32 leaves of a small KL
        assert fitness(sizes, 1 / len(batches)) != fitness(sizes)
        assert expected > 1e-6
    again = Fitness(state.model, state.layout, curves, fit, batches, output)
    again.stitches = fitness.stitches
    assert again(halves) == pytest.approx(fitness(halves), rel=1e-6)
    assert all(torch.equal(before[key], value) for key, value in state.model.state_dict().items())


def test_stitches_are_forgotten_where_there_is_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr("passes.pruning.search.fitness.HELD", 10_000)
    state = state_of(TINY["bert"], tmp_path)
    curves, fit = surgery(state, list(state.layout.axes.values()), 0.01)
    fitness = Fitness(state.model, state.layout, curves, fit, list(calibration(state.data, 8)), HIDDEN)
    for size in (1, 2, 1):
        fitness.known.clear()
        fitness(dict.fromkeys(curves, size))
        assert 1 <= len(fitness.stitches) < len(curves)


# The passes


@pytest.fixture
def paper(monkeypatch):
    machine = Paper(1.2)
    machine.install(monkeypatch)
    return machine


@pytest.mark.parametrize(
    "options", [{"search": "spdy", "search_trials": 15}, {"search": "evolution", "generations": 8}]
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_searched_model_keeps_its_promise_and_is_fitter(options, name, paper, tmp_path):
    (plain,) = ZipLM(speedups=(2.0,)).run(state_of(TINY[name], tmp_path))
    (found,) = ZipLM(speedups=(2.0,), **options).run(state_of(TINY[name], tmp_path))
    figures = json.loads(json.dumps(found.figures))
    assert figures["met"]
    assert figures["measured"] >= 2.0
    assert figures["loss"] == figures["fitness"]
    for history in figures["fitness_history"]:
        assert history[-1][1] <= history[0][1]
    assert figures["tried"] > 8
    assert "fitness" not in plain.figures
    assert ("coefficients" in figures) == (options["search"] == "spdy")


def test_a_uniform_share_is_not_searched_for():
    with pytest.raises(ValueError, match="allocation: search"):
        Prune(speedups=(2.0,), search="spdy")
    menu = Toy(0).menu
    assert type(Prune(speedups=(2.0,), allocation="search").choice(menu, None)) is Choice


# A model that is cut already


def test_times_of_a_cut_model_come_from_the_dense_ones_table(paper, tmp_path, monkeypatch):
    tables = []
    monkeypatch.setattr(
        "compress.latency.table", lambda model, *rest: tables.append(model) or paper.table(model, *rest)
    )
    state = state_of(TINY["bert"], tmp_path)
    (first,) = ZipLM(speedups=(1.5,), prior="relative").run(state)
    dense_time = first.figures["dense_milliseconds"]
    first.give(STATISTICS, next(Calibrate(samples=40).run(first)).facts["statistics"])
    (second,) = ZipLM(speedups=(3.0,), prior="relative").run(first)
    assert [model is first.dense.model for model in tables] == [True, True]
    assert 3.0 <= second.figures["measured"] < 3.4
    assert second.figures["dense_milliseconds"] == dense_time
    dense = layout_of(state.dense.model)
    for name, kept in second.kept.items():
        assert len(kept) == second.layout.axis(name).units
        assert set(kept) <= set(first.kept.get(name, range(dense.axis(name).units)))


def test_a_dropped_block_leaves_the_dense_table_its_names(paper, tmp_path):
    state = state_of(TINY["bert"], tmp_path)
    state.layout = state.layout.drop(state.model, "encoder.layer", [0, 2])
    state.give(STATISTICS, next(Calibrate(samples=40).run(state)).facts["statistics"])
    (result,) = ZipLM(speedups=(3.0,), prior="relative").run(state)
    assert result.figures["met"]
    assert all(not name.startswith("encoder.layer.1") for name in result.kept)
