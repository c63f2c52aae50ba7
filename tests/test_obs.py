"""Laws of structured optimal brain surgery, against plain float64 mathematics."""

import itertools

import pytest
import torch

from passes.pruning.widths.obs import least_squares, removal_order

SHAPES = [(40, 1, 12, 1), (150, 1, 9, 1), (12, 4, 10, 1), (12, 4, 10, 3), (6, 32, 20, 1), (3, 80, 7, 2)]
DAMPINGS = [1e-6, 0.01, 0.3]


def problem(units, width, outputs, readers, seed=0):
    """Weights and Gram matrices of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = units * width
    weights, grams = [], []
    for _ in range(readers):
        mixed = torch.randn(3 * inputs, inputs, generator=generator, dtype=torch.float64)
        mixed = mixed @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
        grams.append(mixed.T @ mixed / len(mixed))
        weights.append(torch.randn(outputs, inputs, generator=generator, dtype=torch.float64))
    return weights, grams


def damp(gram, damping):
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def error(weight, gram, kept, new):
    """Mean squared output error of a weight whose columns `kept` are `new` and whose others are gone."""
    change = -weight.clone()
    change[:, kept] += new
    return torch.trace(change @ gram @ change.T)


def plainly(weights, grams, width, damping):
    """One unit at a time with whole matrices, as the formulas stand."""
    weights, inverses = [w.clone() for w in weights], [torch.linalg.inv(damp(g, damping)) for g in grams]
    alive, order, losses = list(range(weights[0].shape[1] // width)), [], [0.0]
    runs = {unit: slice(unit * width, (unit + 1) * width) for unit in alive}
    while alive:
        costs = {
            unit: sum(
                torch.trace(w[:, runs[unit]] @ torch.linalg.inv(p[runs[unit], runs[unit]]) @ w[:, runs[unit]].T)
                for w, p in zip(weights, inverses, strict=True)
            )
            for unit in alive
        }
        unit = min(alive, key=costs.__getitem__)
        run = runs[unit]
        for w, p in zip(weights, inverses, strict=True):
            ratio = torch.linalg.inv(p[run, run]) @ p[run]
            w -= w[:, run] @ ratio
            p -= p[:, run].clone() @ ratio
        alive.remove(unit)
        order.append(unit)
        losses.append(losses[-1] + float(costs[unit]))
    return order, torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_batched_removals_equal_plain_ones(shape, damping):
    weights, grams = problem(*shape)
    order, losses = removal_order(weights, grams, shape[1], damping)
    expected_order, expected_losses = plainly(weights, grams, shape[1], damping)
    assert order.tolist() == expected_order
    torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_running_loss_is_the_error_of_the_joint_fit(shape, damping):
    units, width = shape[:2]
    weights, grams = problem(*shape)
    order, losses = removal_order(weights, grams, width, damping)
    assert sorted(order.tolist()) == list(range(units))
    for gone in (1, units // 2, units - 1, units):
        kept = [u * width + i for u in sorted(order[gone:].tolist()) for i in range(width)]
        kept = torch.tensor(kept, dtype=torch.long)
        total = sum(
            error(w, damp(g, damping), kept, least_squares(w, g, kept, damping))
            for w, g in zip(weights, grams, strict=True)
        )
        torch.testing.assert_close(losses[gone], total, rtol=1e-8, atol=1e-9)


def test_least_squares_is_the_optimum():
    (weight,), (gram,) = problem(10, 1, 4, 1)
    kept = torch.tensor([0, 3, 4, 8])
    fitted = least_squares(weight, gram, kept, 1e-12)
    best = error(weight, gram, kept, fitted)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = fitted + 0.01 * torch.randn(fitted.shape, generator=generator, dtype=torch.float64)
        assert error(weight, gram, kept, other) > best
    assert torch.allclose(least_squares(weight, gram, torch.arange(10)), weight)
    assert least_squares(weight, gram, torch.tensor([], dtype=torch.long)).shape == (4, 0)


def test_about_the_mean_is_the_fit_to_the_covariance():
    (weight,), (gram,) = problem(10, 1, 4, 1)
    mean, kept = torch.linspace(-1, 1, 10, dtype=torch.float64), torch.tensor([0, 3, 4, 8])
    about_zero = gram + torch.outer(mean, mean)
    fitted = least_squares(weight, about_zero, kept, 0.01, mean)
    torch.testing.assert_close(fitted, least_squares(weight, gram, kept, 0.01))
    assert not torch.allclose(fitted, least_squares(weight, about_zero, kept, 0.01))


@pytest.mark.parametrize("seed", range(5))
def test_surgery_loses_less_than_magnitude(seed):
    (weight,), (gram,) = problem(32, 1, 8, 1, seed)
    _, losses = removal_order([weight], [gram], 1, 1e-9)
    smallest = weight.square().sum(0).argsort()
    for gone in (4, 16, 28):
        kept = smallest[gone:].sort().values
        assert losses[gone] < 0.8 * error(weight, gram, kept, weight[:, kept])
    assert (losses.diff() >= 0).all()


def test_the_first_unit_removed_is_the_best_single_one():
    (weight,), (gram,) = problem(8, 2, 5, 1)
    errors = []
    for unit in range(8):
        kept = torch.tensor([i for i in range(16) if i // 2 != unit])
        errors.append(float(error(weight, gram, kept, least_squares(weight, gram, kept, 1e-9))))
    order, losses = removal_order([weight], [gram], 2, 1e-9)
    assert order[0] == min(range(8), key=errors.__getitem__)
    assert float(losses[1]) == pytest.approx(min(errors), rel=1e-5)


def test_a_duplicate_goes_first_and_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    inputs[:, 7] = inputs[:, 2]
    weight = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    gram = inputs.T @ inputs / len(inputs)
    order, losses = removal_order([weight], [gram], 1, 1e-8)
    assert int(order[0]) in (2, 7)
    assert losses[1] < 1e-5 * losses[-1]
    kept = torch.tensor([i for i in range(12) if i != order[0]])
    torch.testing.assert_close(
        inputs[:, kept] @ least_squares(weight, gram, kept, 1e-8).T, inputs @ weight.T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_never_seen_go_first_and_cost_nothing(damping):
    (weight,), (gram,) = problem(10, 1, 4, 1)
    dead = [1, 6]
    gram[dead] = 0
    gram[:, dead] = 0
    order, losses = removal_order([weight], [gram], 1, damping)
    assert sorted(order[:2].tolist()) == dead
    assert losses[2] == 0
    kept = torch.tensor([i for i in range(10) if i not in dead])
    torch.testing.assert_close(least_squares(weight, gram, kept, damping), weight[:, kept])


def test_permuted_units_give_the_permuted_order():
    (weight,), (gram,) = problem(20, 1, 6, 1)
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    order, losses = removal_order([weight], [gram], 1)
    moved, same = removal_order([weight[:, shuffle]], [gram[shuffle][:, shuffle]], 1)
    assert shuffle[moved].tolist() == order.tolist()
    torch.testing.assert_close(losses, same)


def test_float32_and_given_tensors_are_left_alone():
    weights, grams = problem(70, 1, 6, 1)
    weights, grams = [w.float() for w in weights], [g.float() for g in grams]
    copies = [x.clone() for x in itertools.chain(weights, grams)]
    removal_order(weights, grams, 1)
    assert least_squares(weights[0], grams[0], torch.arange(5)).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(weights, grams), copies, strict=True))
