"""The arithmetic of sparse matrices: what each method leaves has its pattern; identities prove it right."""

from __future__ import annotations

import pytest
import torch

from passes.gram import damped, inverse_factor, output_error
from passes.pruning.sparse.alps import alps, refit
from passes.pruning.sparse.oneshot import costs, magnitude, sparsegpt, wanda
from passes.pruning.sparse.pattern import Pattern

OUT, IN, TOKENS = 24, 96, 400
METHODS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt, "alps": alps}
PATTERNS = {
    "half": Pattern(0.5),
    "most": Pattern(0.75),
    "2:4": Pattern(0.5, of=4),
    "1:4": Pattern(0.75, of=4),
    "4:8": Pattern(0.5, of=8),
    "runs of 4": Pattern(0.5, block=4),
}


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (24, 96) and the Gram matrix of correlated inputs of very different sizes."""
    draw = torch.Generator().manual_seed(3)
    mix = torch.randn(IN, IN, generator=draw) / IN**0.5 + 0.3
    sizes = torch.logspace(-1, 1, IN)[torch.randperm(IN, generator=draw)]
    inputs = torch.randn(TOKENS, IN, generator=draw) @ mix * sizes
    return torch.randn(OUT, IN, generator=draw), inputs.T @ inputs / TOKENS


def errors(weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern) -> dict[str, float]:
    return {name: output_error(method(weight, gram, pattern)[0] - weight, gram) for name, method in METHODS.items()}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_zeros_are_those_of_the_pattern(layer, method, pattern: Pattern) -> None:
    weight, gram = layer
    sparse, kept = method(weight, gram, pattern)
    assert torch.equal(sparse != 0, kept)
    assert sparse.dtype == weight.dtype
    assert int((~kept).sum()) == pattern.sparsity * kept.numel()
    if pattern.of:
        assert (kept.unflatten(1, (-1, pattern.of)).sum(-1) == (1 - pattern.sparsity) * pattern.of).all()
    runs = kept.unflatten(1, (-1, pattern.block))
    assert torch.equal(runs.all(-1), runs.any(-1))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_each_method_beats_the_plainer_one(layer, pattern: Pattern) -> None:
    found = errors(*layer, pattern)
    assert found["alps"] < 0.9 * found["sparsegpt"] < 0.5 * found["wanda"] < 0.4 * found["magnitude"]


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_with_independent_inputs_of_one_size_magnitude_decides(pattern: Pattern, monkeypatch) -> None:
    weight = torch.randn(1, IN, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("passes.pruning.sparse.oneshot.BLOCK", IN)
    for method in (wanda, sparsegpt):
        sparse, _ = method(weight, 2 * torch.eye(IN), pattern)
        torch.testing.assert_close(sparse, magnitude(weight, torch.eye(IN), pattern)[0])


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, of=4)])
def test_wanda_is_sparsegpt_for_independent_inputs(pattern: Pattern, monkeypatch) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, gram = torch.randn(1, IN, generator=draw), torch.diag(torch.rand(IN, generator=draw) + 0.1)
    monkeypatch.setattr("passes.pruning.sparse.oneshot.BLOCK", IN)
    assert torch.equal(wanda(weight, gram, pattern)[0], sparsegpt(weight, gram, pattern, damping=0.0)[0])


def test_wanda_keeps_in_each_row_what_is_largest_times_the_norm_of_its_input(layer) -> None:
    weight, gram = layer
    _, kept = wanda(weight, gram, Pattern(0.25))
    scores = weight.abs() * gram.diagonal().sqrt()
    assert (kept.sum(1) == 0.75 * IN).all()
    assert (scores.masked_fill(~kept, torch.inf).amin(1) >= scores.masked_fill(kept, 0).amax(1)).all()


@pytest.mark.parametrize("block", [1, 4])
def test_the_cost_of_a_run_is_that_of_the_best_that_the_rest_can_do(layer, block: int) -> None:
    weight, gram = layer[0].double(), damped(layer[1], 0.01)
    factor, start = inverse_factor(gram), 40
    gone = slice(start, start + block)
    found = costs(weight[:, gone], factor[gone, gone], Pattern(0.5, block=block)).sum(1)
    # Later columns alone may change: minimise d G d over d with d = -w on the run, by their normal equations.
    after = slice(start + block, IN)
    best = torch.zeros_like(weight)
    best[:, gone] = -weight[:, gone]
    best[:, after] = torch.linalg.solve(gram[after, after], gram[after, gone] @ weight[:, gone].T).T
    torch.testing.assert_close(found, ((best @ gram) * best).sum(1), rtol=1e-8, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_loss_of_sparsegpt_is_the_sum_of_what_it_let_others_make_up_for(layer, pattern, monkeypatch) -> None:
    weight, gram = layer
    errs = []
    whole = torch.Tensor.addr_
    monkeypatch.setattr(torch.Tensor, "addr_", lambda self, one, *a, **k: errs.append(one) or whole(self, one, *a, **k))
    sparse, _ = sparsegpt(weight.double(), gram, pattern)
    assert len(errs) == IN
    told = sum(float(error.square().sum()) for error in errs)
    assert told == pytest.approx(output_error(sparse - weight, damped(gram, 0.01)), rel=1e-8)


@pytest.mark.parametrize("pattern", [Pattern(0.5, of=4), Pattern(0.75, of=8)])
def test_blocks_of_columns_change_nothing(layer, pattern: Pattern, monkeypatch) -> None:
    whole, _ = sparsegpt(*layer, pattern)
    monkeypatch.setattr("passes.pruning.sparse.oneshot.BLOCK", 8)
    torch.testing.assert_close(sparsegpt(*layer, pattern)[0], whole)


def test_a_refit_ends_where_no_weight_that_stays_could_do_better(layer) -> None:
    weight, gram = layer[0].double(), damped(layer[1], 0.01)
    scale = gram.diagonal().sqrt()
    unit = gram / scale / scale[:, None]
    sparse, kept = sparsegpt(weight, layer[1], Pattern(0.6))
    found = refit(weight * scale, unit, kept, sparse * scale, steps=4 * IN)
    gradient = (found - weight * scale) @ unit
    assert gradient[kept].abs().max() < 1e-8 * gradient[~kept].abs().max()
    assert output_error(found / scale - weight, gram) < 0.9 * output_error(sparse - weight, gram)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_conjugate_gradients_of_alps_help(layer, pattern: Pattern, monkeypatch) -> None:
    weight, gram = layer
    fitted, kept = alps(weight, gram, pattern)
    monkeypatch.setattr("passes.pruning.sparse.alps.refit.__defaults__", (0,))
    bare, same = alps(weight, gram, pattern)
    assert torch.equal(kept, same)
    assert output_error(fitted - weight, gram) < output_error(bare - weight, gram)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_was_gone_stays_and_counts(layer, method, pattern: Pattern) -> None:
    weight, gram = layer
    _, held = magnitude(weight, gram, Pattern(0.25, block=pattern.block))
    if pattern.of:
        held = magnitude(weight, gram, Pattern(1 / pattern.of, of=pattern.of))[1]
    sparse, kept = method(weight * held, gram, pattern, held)
    assert not (kept & ~held).any()
    assert (sparse[~held] == 0).all()
    assert int((~kept).sum()) == pattern.sparsity * kept.numel()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_weights_of_inputs_never_seen_do_no_harm(layer, method) -> None:
    weight, gram = layer
    gram = gram.clone()
    gram[7], gram[:, 7] = 0, 0
    sparse, _ = method(weight, gram, Pattern(0.5))
    assert sparse.isfinite().all()
    if method is not magnitude:
        assert (sparse[:, 7] == 0).all()
