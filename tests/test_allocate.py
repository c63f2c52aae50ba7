"""The allocation is the best there is, and never over budget."""

import itertools

import numpy as np
import pytest

from compress.allocate import solve
from compress.errors import ReachError


def case(seed, axes=5, options=4):
    generator = np.random.default_rng(seed)
    times = [np.sort(generator.uniform(0, 3, options)) for _ in range(axes)]
    losses = [np.sort(generator.uniform(0, 1, options))[::-1] for _ in range(axes)]
    least, most = sum(t.min() for t in times), sum(t.max() for t in times)
    return losses, times, least + generator.uniform(0, 1) * (most - least)


def summed(values, options):
    return sum(float(value[option]) for value, option in zip(values, options, strict=True))


def best_of_all(losses, times, budget):
    tuples = itertools.product(*(range(len(loss)) for loss in losses))
    return min(summed(losses, options) for options in tuples if summed(times, options) <= budget)


@pytest.mark.parametrize("seed", range(60))
def test_equals_brute_force(seed):
    losses, times, budget = case(seed)
    options = solve(losses, times, budget)
    assert summed(times, options) <= budget
    # Rounding up may waste one bucket per axis, so the best for that much less is the least to be expected.
    spare = budget * (1 - len(losses) / 10_000)
    assert best_of_all(losses, times, budget) <= summed(losses, options) <= best_of_all(losses, times, spare)


@pytest.mark.parametrize("buckets", [50, 7])
@pytest.mark.parametrize("seed", range(100))
def test_coarse_buckets_never_break_the_budget(seed, buckets):
    losses, times, budget = case(seed)
    assert summed(times, solve(losses, times, budget, buckets)) <= budget


def test_everything_fits_in_its_own_time():
    losses = [np.array([1.0, 0.5, 0.0])] * 3
    times = [np.array([0.0, 1.0, 2.0])] * 3
    assert solve(losses, times, 6.01) == [2, 2, 2]
    assert solve(losses, times, 0.0) == [0, 0, 0]


def test_options_slower_than_the_budget_are_passed_over():
    assert solve([np.array([0.0, 5.0])], [np.array([100.0, 1.0])], 2.0) == [1]


def test_a_budget_met_to_the_last_digit_is_met():
    times = [np.array([1 / 3, 1.0])] * 3
    assert solve([np.array([1.0, 0.0])] * 3, times, 3 * (1 / 3)) == [0, 0, 0]


def test_unequal_numbers_of_options():
    losses = [np.array([0.0]), np.array([3.0, 0.0]), np.array([2.0, 1.0, 0.0])]
    times = [np.array([1.0]), np.array([0.0, 1.0]), np.array([0.0, 1.0, 2.0])]
    assert solve(losses, times, 3.01) == [0, 1, 1]


@pytest.mark.parametrize("budget", [0.5, -1.0])
def test_out_of_reach_tells_the_fastest(budget):
    with pytest.raises(ReachError, match=r"fastest takes 2 ms"):
        solve([np.zeros(2)] * 2, [np.array([1.0, 4.0])] * 2, budget)
