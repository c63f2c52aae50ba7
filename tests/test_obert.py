"""The Optimal BERT Surgeon: its identities on matrices, and the models that it leaves."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path

import pytest
import torch

from compress.contract import MASKS
from compress.errors import PlanError, TrainingError
from compress.masks import zeros
from compress.plan import Plan, Tables
from exporters import EXPORTERS
from passes import PASSES
from passes.pruning.sparse.fisher import add_gradients_, blocked, candidates, inverse_fisher, unblocked, without
from passes.pruning.sparse.obert import Obert
from passes.pruning.sparse.pattern import Pattern
from tests.test_distill import make_state

BLOCKS, SIZE, COUNT, DAMPING = 5, 12, 40, 1e-3


@pytest.fixture
def surface() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (5, 12), their Fisher matrices (5, 12, 12) and the inverses of these by recursion."""
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(COUNT, BLOCKS, SIZE, generator=draw, dtype=torch.float64)
    gradients = gradients @ torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64)
    fisher = DAMPING * torch.eye(SIZE) + torch.einsum("mbi,mbj->bij", gradients, gradients) / COUNT
    inverse = inverse_fisher(BLOCKS, SIZE, DAMPING, gradients)
    for part in gradients.split(7):
        add_gradients_(inverse, part, COUNT)
    return torch.randn(BLOCKS, SIZE, generator=draw, dtype=torch.float64), fisher, inverse


def test_the_recursion_ends_at_the_inverse(surface) -> None:
    _, fisher, inverse = surface
    torch.testing.assert_close(inverse, torch.linalg.inv(fisher), rtol=1e-7, atol=1e-9)


def test_gradients_one_by_one_and_all_at_once_are_one(surface) -> None:
    draw = torch.Generator().manual_seed(1)
    gradients = torch.randn(COUNT, BLOCKS, SIZE, generator=draw, dtype=torch.float64)
    one, other = (inverse_fisher(BLOCKS, SIZE, DAMPING, gradients) for _ in range(2))
    for gradient in gradients:
        pulled = (one @ gradient[..., None])[..., 0]  # equation 4 of the paper, with the number of gradients below
        bottom = COUNT + (gradient * pulled).sum(-1)
        one -= pulled[:, :, None] * pulled[:, None, :] / bottom[:, None, None]
    add_gradients_(other, gradients, COUNT)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def least(weight: torch.Tensor, fisher: torch.Tensor, gone: list[int]) -> tuple[torch.Tensor, float]:
    """The weights that minimise ``d F d / 2`` where those that are gone are zero, by their normal equations."""
    stay = [index for index in range(SIZE) if index not in gone]
    change = torch.zeros_like(weight)
    change[gone] = -weight[gone]
    change[stay] = torch.linalg.solve(fisher[stay][:, stay], fisher[stay][:, gone] @ weight[gone])
    return weight + change, float(change @ fisher @ change) / 2


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, block=4), Pattern(0.5, of=4), Pattern(2 / 3, of=6)])
def test_costs_are_those_of_the_best_that_the_block_can_do(surface, pattern: Pattern) -> None:
    weight, fisher, inverse = surface
    goes, costs = candidates(weight, inverse, pattern)
    run, count = pattern.run, round(pattern.sparsity * pattern.of) or pattern.run
    assert goes.shape == (BLOCKS, SIZE // run, run)
    assert (goes.sum(-1) == count).all()
    for block in range(BLOCKS):
        for index in range(SIZE // run):
            found = {
                choice: least(weight[block], fisher[block], [run * index + at for at in choice])[1]
                for choice in combinations(range(run), count)
            }
            best = min(found, key=lambda choice: found[choice])
            assert float(costs[block, index]) == pytest.approx(found[best], rel=1e-8)
            assert tuple(goes[block, index].nonzero().flatten().tolist()) == best


def test_what_stays_makes_up_for_all_that_goes_as_well_as_it_can(surface) -> None:
    weight, fisher, inverse = surface
    gone = torch.rand(BLOCKS, SIZE, generator=torch.Generator().manual_seed(2)) < 0.5
    gone[0], gone[1] = False, True
    found = without(weight, inverse, gone)
    assert torch.equal(found[0], weight[0])
    assert (found[gone] == 0).all()
    for block in range(BLOCKS):
        best, _ = least(weight[block], fisher[block], gone[block].nonzero().flatten().tolist())
        torch.testing.assert_close(found[block], best, rtol=1e-8, atol=1e-8)


def test_what_is_gone_stays_gone_and_is_first_to_go(surface) -> None:
    weight, _, _ = surface
    gone = torch.arange(SIZE) % 3 == 0
    gradients = torch.randn(COUNT, BLOCKS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    inverse = inverse_fisher(BLOCKS, SIZE, DAMPING, gradients)
    add_gradients_(inverse, gradients.masked_fill(gone, 0.0), COUNT)
    weight = weight.masked_fill(gone, 0.0)
    _, costs = candidates(weight, inverse, Pattern(0.5))
    assert ((costs == 0) == gone[None]).all()
    more = gone | (torch.arange(SIZE) == 1)
    assert (without(weight, inverse, more.expand(BLOCKS, -1))[:, gone] == 0).all()


def test_blocks_are_a_matrix_read_row_by_row() -> None:
    matrix = torch.arange(21.0).view(3, 7)
    blocks = blocked(matrix, 4)
    assert blocks.shape == (6, 4)
    assert torch.equal(blocks[1], torch.tensor([4.0, 5.0, 6.0, 7.0]))
    assert torch.equal(blocks[-1], torch.tensor([20.0, 0.0, 0.0, 0.0]))
    assert torch.equal(unblocked(blocks, matrix), matrix)
    assert torch.equal(blocked(matrix.expand(2, 3, 7), 4)[1], blocks)


OPTIONS = {"gradients": 12, "batch_size": 4, "size": 8, "damping": 0.1}


def surgeon(state, **options):
    (after,) = Obert(**{**OPTIONS, **options}).run(state)
    return after


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "question-answering", "fill-mask"])
@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"runs": {"keep": 2, "of": 4}}, {"sparsity": 0.6, "block": 4}])
def test_every_task_with_a_loss_comes_out_sparse(task: str, options: dict, tmp_path: Path) -> None:
    state = make_state(tmp_path, task)
    state.workshop.step.mkdir(parents=True)
    before = copy.deepcopy(state.model.state_dict())
    after = surgeon(state, recomputations=2, **options)
    masks = dict(after.facts[MASKS.name])
    told = zeros(after.model, masks)
    assert told["filled"] == {}
    assert told["share"] == pytest.approx(0.5 if "runs" in options else 0.6, abs=0.001)
    assert len(masks) == 3 * 6
    for name, mask in masks.items():
        if "runs" in options:
            assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        if "block" in options:
            assert torch.equal(mask.unflatten(1, (-1, 4)).all(-1), mask.unflatten(1, (-1, 4)).any(-1))
        assert not torch.equal(before[name] * mask, after.model.state_dict()[name])  # what stays has made up
    assert all(torch.equal(one, after.model.state_dict()[name]) for name, one in before.items() if name not in masks)
    assert after.figures["gradient_of"] == "a batch of 4"
    assert all(one.requires_grad for one in after.model.parameters())


def loss(state) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in state.data.batches("calibration", 8, seed=0):
            total += float(state.model.eval()(**batch).loss)
    return total


def test_it_hurts_the_loss_less_than_magnitude_and_less_in_more_parts(tmp_path: Path) -> None:
    found = {}
    for part in (1, 4):
        state = make_state(tmp_path, "text-generation")
        state.workshop.step.mkdir(parents=True, exist_ok=True)
        found[part] = loss(surgeon(state, sparsity=0.7, recomputations=part, gradients=40, batch_size=1))
    state = make_state(tmp_path, "text-generation")
    (plain,) = PASSES["sparsify"](method="magnitude", sparsity=0.7).run(state)
    assert found[4] < found[1] < loss(plain)


def test_it_goes_on_from_zeros_that_are_there(tmp_path: Path) -> None:
    state = make_state(tmp_path, "text-classification")
    state.workshop.step.mkdir(parents=True)
    before = dict(surgeon(state, sparsity=0.4).facts[MASKS.name])
    after = surgeon(state, sparsity=0.7)
    masks = dict(after.facts[MASKS.name])
    assert all(not (mask & ~before[name]).any() for name, mask in masks.items())
    assert zeros(after.model, masks)["share"] == pytest.approx(0.7, abs=0.001)


def test_little_memory_changes_nothing_but_the_time(tmp_path: Path) -> None:
    models = []
    for memory in (4.0, 1e-9):
        state = make_state(tmp_path, "text-classification")
        state.workshop.step.mkdir(parents=True, exist_ok=True)
        models.append(surgeon(state, sparsity=0.5, recomputations=1, memory=memory).model.state_dict())
    for name, one in models[0].items():
        torch.testing.assert_close(one, models[1][name], rtol=1e-4, atol=1e-5)


def test_a_model_without_a_loss_is_refused(tmp_path: Path) -> None:
    state = make_state(tmp_path, "feature-extraction")
    state.workshop.step.mkdir(parents=True)
    with pytest.raises(TrainingError, match="feature-extraction on this data has no loss of its own"):
        surgeon(state)


def test_blocks_that_cut_through_runs_are_told() -> None:
    plan = {"model": "m", "passes": [{"obert": {"block": 4, "size": 50}}]}
    with pytest.raises(PlanError, match="blocks of 50 weights cut through runs of 4; expected a multiple"):
        Plan.read(plan, Tables(PASSES, EXPORTERS))
