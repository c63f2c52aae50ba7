"""Laws of the distillation losses: nothing to learn from a twin, and padding never matters."""

import math

import pytest
import torch
import torch.nn.functional as F

from passes.distillation.distill import Weights
from passes.distillation.losses import (
    LOSSES,
    OFFICIAL_EPSILON,
    logit_kl,
    similarity_distance,
    square_head,
    token_distance,
)

BATCH, LENGTH, WIDTH, BLOCKS = 3, 7, 5, 4
MASK = torch.arange(LENGTH)[None] < torch.tensor([7, 4, 1])[:, None]


def states(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, LENGTH, WIDTH, generator=generator) for _ in range(BLOCKS)]


def apply(name: str, student: list[torch.Tensor], teacher: list[torch.Tensor], mask: torch.Tensor = MASK):
    """The loss of that name on what it reads of such states."""
    if name in ("hidden", "tokens"):
        return LOSSES[name](student, teacher, mask)
    if name == "logits":
        return LOSSES[name](student[-1], teacher[-1], mask)
    return LOSSES[name](student[-1][:, 0], teacher[-1][:, 0])


def test_every_loss_has_a_weight_and_every_weight_a_loss():
    assert set(Weights.model_fields) == {*LOSSES, "task"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_twin_has_no_loss_and_no_gradient(name):
    student = [one.requires_grad_() for one in states(1)]
    loss = apply(name, student, states(1))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert all(one.grad is None or one.grad.abs().max() < 1e-6 for one in student)


@pytest.mark.parametrize("name", LOSSES)
def test_a_stranger_has_a_loss_and_its_gradient_lowers_it(name):
    student = [one.requires_grad_() for one in states(1)]
    before = apply(name, student, states(2))
    before.backward()
    moved = [one.detach() - 0.01 * (one.grad if one.grad is not None else 0) for one in student]
    assert 0 < apply(name, moved, states(2)) < before


@pytest.mark.parametrize("poison", [1e3, math.nan])
@pytest.mark.parametrize("name", ["hidden", "tokens", "logits"])
def test_padding_never_matters(name, poison):
    student, teacher = states(1), states(2)
    spoiled = [one.masked_fill(~MASK[..., None], poison).requires_grad_() for one in student]
    loss = apply(name, spoiled, [one.masked_fill(~MASK[..., None], -poison) for one in teacher])
    loss.backward()
    assert torch.equal(loss, apply(name, student, teacher))
    gradients = [one.grad for one in spoiled if one.grad is not None]
    assert gradients
    assert all(one[~MASK].abs().max() == 0 and one[MASK].abs().max() > 0 for one in gradients)


@pytest.mark.parametrize("name", ["hidden", "embedding", "similarity"])
def test_relative_losses_ignore_a_common_scale(name):
    scaled = apply(name, [7 * one for one in states(1)], [7 * one for one in states(2)])
    torch.testing.assert_close(scaled, apply(name, states(1), states(2)), rtol=1e-5, atol=1e-6)


def test_similarity_ignores_a_turn_of_all_embeddings():
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))).Q
    student, teacher = states(1)[0][:, 0], states(2)[0][:, 0]
    turned = similarity_distance(student @ turn, teacher)
    torch.testing.assert_close(turned, similarity_distance(student, teacher), rtol=1e-4, atol=1e-6)
    assert similarity_distance(student[:1], teacher[:1]) == 0


def test_a_student_of_zeros_has_a_square_head_loss_of_one_a_block():
    zeros = [torch.zeros_like(one) for one in states(2)]
    assert square_head(zeros, states(2), MASK).item() == pytest.approx(BLOCKS, abs=1e-5)


def test_the_official_epsilon_plays_down_small_states():
    small = [0.05 * one for one in states(2)]
    zeros = [torch.zeros_like(one) for one in small]
    assert square_head(zeros, small, MASK, OFFICIAL_EPSILON) < 0.5 * square_head(zeros, small, MASK)


def test_square_head_in_bfloat16_keeps_small_differences():
    teacher = [one.bfloat16() for one in states(2)]
    student = [one.float() * (1 + 1e-4) for one in teacher]
    assert square_head(student, teacher, MASK).item() == pytest.approx(BLOCKS * 1e-8, rel=0.05)


def test_token_distance_is_a_sum_over_width_and_a_mean_over_tokens_and_blocks():
    student = states(2)
    shifted = [one + 2.0 for one in student]
    assert token_distance(shifted, student, MASK).item() == pytest.approx(4 * WIDTH, rel=1e-5)


def test_logit_kl_is_the_divergence_of_the_softmaxes():
    student, teacher = states(1)[0], states(2)[0]
    p, q = F.softmax(teacher[MASK], -1), F.softmax(student[MASK], -1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(logit_kl(student, teacher, MASK), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logit_kl(student + 3, teacher - 5, MASK), expected, rtol=1e-4, atol=1e-6)


def test_logit_kl_at_high_temperature_is_half_the_variance_of_the_difference():
    # Hinton et al.: with zero-mean logits, T^2 KL -> |z - v|^2 / 2N as T grows, so the weight needs no retuning.
    student, teacher = (one[0] - one[0].mean(-1, keepdim=True) for one in (states(1), states(2)))
    limit = (student - teacher).square().mean(-1).mean() / 2
    torch.testing.assert_close(logit_kl(student, teacher, temperature=50), limit, rtol=0.03, atol=0)


def test_a_single_logit_is_compared_as_a_score():
    assert logit_kl(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]])).item() == pytest.approx(2.0)


def test_no_labelled_token_gives_no_loss():
    assert logit_kl(states(1)[0], states(2)[0], torch.zeros_like(MASK)).item() == 0
