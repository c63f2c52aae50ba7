"""Laws of the distillation losses, over the whole table, and the identities that each is known by."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from compress.errors import PlanError
from compress.families import layout_of
from compress.plan import Plan, Tables, schema
from exporters import EXPORTERS
from passes import PASSES
from passes.distillation.choice import Losses
from passes.distillation.distill import Distill
from passes.distillation.heads import tap
from passes.distillation.losses import LOSSES, logit_kl, square_head
from passes.distillation.losses.attention import attention, likeness, relation, relation_heads
from passes.distillation.losses.base import Heads, Sample, Seen, Widths, kl, pooled
from passes.distillation.losses.embeddings import (
    info_nce,
    lead,
    mutual_information,
    rkd_angle,
    rkd_distance,
    similarity_distance,
)
from passes.distillation.losses.focused import amplified, clipped_kl
from passes.distillation.losses.logits import most_to_gain, plan
from passes.distillation.losses.states import OFFICIAL_EPSILON, graph_distance, token_distance
from passes.distillation.losses.subclasses import splits, subclass_logs
from passes.distillation.losses.tasks import listwise_kl, margin_mse
from tests.conftest import TINY

BATCH, LENGTH, WIDTH, BLOCKS, CLASSES, READ = 4, 7, 6, 3, 5, 9
MASK = torch.arange(LENGTH)[None] < torch.tensor([7, 4, 1, 5])[:, None]
VANISHING = [name for name, cls in LOSSES.items() if cls.vanishes]
PROJECTED = [name for name, cls in LOSSES.items() if "project" in cls.model_fields]
DIVERGENCES = [name for name, cls in LOSSES.items() if hasattr(cls, "between")]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(seed: int) -> dict[str, list[torch.Tensor]]:
    """What a model shows, by name."""
    return {
        "states": [draw(seed * 10 + block, BATCH, LENGTH, WIDTH) for block in range(BLOCKS)],
        "predictions": [draw(seed * 10 + 7, BATCH, LENGTH, CLASSES)],
        "heads": list(draw(seed * 10 + 8, 3, BATCH, 2, LENGTH, 3)),
        "features": [draw(seed * 10 + 9, BATCH, LENGTH, READ)],
    }


SAMPLE = Sample(draw(5, 60, READ), 2 * draw(6, 60, CLASSES), draw(7, CLASSES, READ))
WIDTHS = Widths(WIDTH, WIDTH, BLOCKS, features=READ, sample=SAMPLE)


def show(parts: dict[str, list[torch.Tensor]], mask: torch.Tensor = MASK) -> Seen:
    (predictions,) = parts["predictions"]
    labels = tensors(2)["predictions"][0][: len(mask)]
    loss = (predictions[:, :LENGTH] - labels)[mask[:, :LENGTH]].square().mean()
    chunks = ((mask.cumsum(1) - 1) // 2 + 4 * torch.arange(len(mask))[:, None]).masked_fill(~mask, -1)  # of two tokens
    tokens = torch.arange(mask.shape[1]).expand_as(mask) % CLASSES
    heads = Heads(*parts["heads"])
    (features,) = parts["features"]
    more = {"tokens": tokens, "chunks": chunks, "features": features, "loss": loss}
    return Seen(mask, parts["states"], predictions, mask, heads, **more)


def leaves(seed: int) -> dict[str, list[torch.Tensor]]:
    return {name: [one.requires_grad_() for one in parts] for name, parts in tensors(seed).items()}


def taken(name: str, student: Seen, teacher: Seen) -> torch.Tensor:
    """The loss with the network or the map that it always learns; counts that a run keeps are none."""
    loss = LOSSES[name]()
    own = loss.learned(WIDTHS)
    return loss.of(student, teacher, own if own is not None and any(True for _ in own.parameters()) else None)


def flat(parts: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
    return [one for several in parts.values() for one in several]


def spoiled(parts: dict[str, list[torch.Tensor]], value: float) -> dict[str, list[torch.Tensor]]:
    """The same with that value wherever there is padding."""
    padding = {name: ~MASK[:, None, :, None] if name == "heads" else ~MASK[..., None] for name in parts}
    return {name: [one.masked_fill(padding[name], value) for one in several] for name, several in parts.items()}


# Laws of all losses.


@pytest.mark.parametrize("name", VANISHING)
def test_a_twin_has_no_loss_and_no_gradient(name):
    student = leaves(1)
    loss = taken(name, show(student), show(tensors(1)))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert all(one.grad is None or one.grad.abs().max() < 1e-6 for one in flat(student))


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in VANISHING])
def test_no_stranger_has_less_loss_than_a_twin(name):
    teacher = show(tensors(2))
    twin = taken(name, teacher, teacher)
    assert all(twin < taken(name, show(tensors(seed)), teacher) for seed in range(3, 9))


@pytest.mark.parametrize("name", LOSSES)
def test_a_stranger_has_a_loss_and_its_gradient_lowers_it(name):
    student, teacher = leaves(1), show(tensors(2))
    before = taken(name, show(student), teacher)
    before.backward()
    before = before.detach()
    slope = sum(float(one.grad.square().sum()) for one in flat(student) if one.grad is not None)
    moved = {
        key: [one.detach() - 1e-3 / slope * (one.grad if one.grad is not None else 0) for one in several]
        for key, several in student.items()
    }
    after = taken(name, show(moved), teacher).detach()
    assert float(before - after) == pytest.approx(1e-3, rel=0.2)
    assert after > 0 or not LOSSES[name].vanishes


@pytest.mark.parametrize("poison", [1e3, math.nan])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_never_matters(name, poison):
    student = {key: [one.requires_grad_() for one in several] for key, several in spoiled(tensors(1), poison).items()}
    loss = taken(name, show(student), show(spoiled(tensors(2), -poison)))
    loss.backward()
    assert torch.equal(loss, taken(name, show(tensors(1)), show(tensors(2))))
    gradients = {key: [one.grad for one in several if one.grad is not None] for key, several in student.items()}
    assert flat(gradients)
    for key, several in gradients.items():
        for one in several:
            tokens = one.transpose(1, 2) if key == "heads" else one
            assert tokens[~MASK].abs().max() == 0
            assert tokens[MASK].abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_more_padding_changes_nothing(name):
    def longer(parts):
        return {key: [torch.nn.functional.pad(one, (0, 0, 0, 3)) for one in two] for key, two in parts.items()}

    mask = torch.nn.functional.pad(MASK, (0, 3))
    pair = (tensors(1), tensors(2))
    long = [replace(show(longer(parts), mask), loss=show(parts).loss) for parts in pair]
    torch.testing.assert_close(taken(name, *long), taken(name, *map(show, pair)))


@pytest.mark.parametrize("name", LOSSES)
def test_the_arithmetic_is_float32_whatever_comes_in(name):
    half = {key: [one.detach().bfloat16().requires_grad_() for one in several] for key, several in leaves(1).items()}
    full = {key: [one.detach().float() for one in several] for key, several in half.items()}
    teacher = {key: [one.bfloat16() for one in several] for key, several in tensors(2).items()}
    loss = taken(name, show(half), show(teacher))
    loss.backward()
    assert all(one.grad is None or one.grad.isfinite().all() for one in flat(half))
    if name != "task":  # a model's own loss is its own affair
        exact = taken(name, show(full), show({key: [one.float() for one in two] for key, two in teacher.items()}))
        assert torch.equal(loss, exact)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_one_token_has_a_loss_that_is_a_number(name):
    student = {key: [one[:1].detach().requires_grad_() for one in several] for key, several in tensors(1).items()}
    teacher = {key: [one[:1] for one in several] for key, several in tensors(2).items()}
    one = (torch.arange(LENGTH) < 1)[None]
    loss = taken(name, show(student, one), show(teacher, one))
    loss.backward()
    assert loss.isfinite()
    assert all(one.grad is None or one.grad.isfinite().all() for one in flat(student))


@pytest.mark.parametrize("name", [name for name, cls in LOSSES.items() if not cls().same_width])
def test_losses_that_need_no_equal_widths_take_others(name):
    parts = tensors(1)
    narrow = {**parts, "states": [one[..., :4] for one in parts["states"]]}
    if not getattr(LOSSES[name], "head_by_head", False):  # else they are as many, of any size
        narrow["heads"] = [torch.cat([one, one[:, :1]], 1) for one in parts["heads"]]
    assert taken(name, show(narrow), show(tensors(2))).isfinite()


@pytest.mark.parametrize("name", PROJECTED)
def test_a_map_starts_as_if_it_were_not_there_and_is_learned(name):
    loss, student, teacher = LOSSES[name](project=True), leaves(1), show(tensors(2))
    own = loss.learned(WIDTHS)
    mapped = loss.of(show(student), teacher, own)
    torch.testing.assert_close(mapped, LOSSES[name]().of(show(tensors(1)), teacher))
    mapped.backward()
    assert all(one.grad.abs().max() > 0 for one in own.parameters())
    assert not loss.same_width


@pytest.mark.parametrize("name", PROJECTED)
def test_a_map_puts_channels_where_they_were(name):
    loss, kept = LOSSES[name](project=True), [0, 2, 3, 5]
    teacher = tensors(2)
    student = {**teacher, "states": [one[..., kept] for one in teacher["states"]]}
    blanked = {**teacher, "states": [one.clone() for one in teacher["states"]]}
    for one in blanked["states"]:
        one[..., [1, 4]] = 0
    mapped = loss.of(show(student), show(teacher), loss.learned(Widths(4, WIDTH, BLOCKS, kept)))
    torch.testing.assert_close(mapped, LOSSES[name]().of(show(blanked), show(teacher)))


@pytest.mark.parametrize("name", [name for name, cls in LOSSES.items() if "last" in cls.model_fields])
def test_the_tail_is_blind_to_what_lies_below(name):
    loss, student, teacher = LOSSES[name](last=1), leaves(1), tensors(2)
    loss.of(show(student), show(teacher)).backward()
    assert [one.grad is not None for one in student["states"]] == [False] * (BLOCKS - 1) + [True]
    cut = [{**parts, "states": parts["states"][-1:]} for parts in (tensors(1), teacher)]
    whole = LOSSES[name]().of(*map(show, cut))
    torch.testing.assert_close(loss.of(show(tensors(1)), show(teacher)), whole)


# Predictions.


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_single_logit_is_compared_as_a_score(name):
    student, teacher = (Seen(MASK, predictions=torch.tensor(one)) for one in ([[1.0], [3.0]], [[1.0], [1.0]]))
    assert LOSSES[name]().of(student, teacher).item() == pytest.approx(2.0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_row_that_counts_gives_no_loss(name):
    nothing = [replace(show(tensors(seed)), counted=torch.zeros_like(MASK)) for seed in (1, 2)]
    assert LOSSES[name]().of(*nothing).item() == 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_only_differences_of_logits_count(name):
    student, teacher = tensors(1), tensors(2)
    shifted = [{**parts, "predictions": [parts["predictions"][0] + by]} for parts, by in ((student, 3), (teacher, -5))]
    loss = LOSSES[name]()
    torch.testing.assert_close(
        loss.of(*map(show, shifted)), loss.of(show(student), show(teacher)), rtol=1e-4, atol=1e-5
    )


def test_logit_kl_at_high_temperature_is_half_the_variance_of_the_difference():
    # Hinton et al.: with zero-mean logits, T^2 KL -> |z - v|^2 / 2N as T grows, so the weight needs no retuning.
    student, teacher = (one - one.mean(-1, keepdim=True) for one in (draw(1, 9, CLASSES), draw(2, 9, CLASSES)))
    limit = (student - teacher).square().mean(-1).mean() / 2
    torch.testing.assert_close(logit_kl(student, teacher, temperature=50), limit, rtol=0.03, atol=0)


def distance(name: str, q: torch.Tensor, p: torch.Tensor, **options) -> float:
    return LOSSES[name](**options).compare(q, p).item()


@pytest.mark.parametrize("seed", range(3))
def test_divergences_keep_to_their_definitions(seed):
    p, q = (2 * draw(one, 9, CLASSES).double() for one in (seed, seed + 20))
    a, b = p.softmax(-1), q.softmax(-1)
    forward, reverse = ((one * (one / other).log()).sum(-1).mean().item() for one, other in ((a, b), (b, a)))
    assert distance("logits", q, p) == pytest.approx(forward, rel=1e-4)
    assert distance("reverse", q, p) == distance("logits", p, q) == pytest.approx(reverse, rel=1e-4)
    assert distance("jsd", q, p) == pytest.approx(distance("jsd", p, q), rel=1e-5)
    assert distance("jsd", q, p) < math.log(2)
    assert distance("jsd", q, p, beta=1e-4) / 1e-4 == pytest.approx(forward, rel=0.01)
    assert distance("jsd", q, p, beta=1 - 1e-4) / 1e-4 == pytest.approx(reverse, rel=0.01)
    assert distance("skew", q, p, alpha=1e-6) == pytest.approx(forward, rel=1e-3)
    assert distance("skew_reverse", q, p, alpha=1e-6) == pytest.approx(reverse, rel=1e-3)


@pytest.mark.parametrize("name", ["skew", "skew_reverse"])
@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_skew_divergences_are_bounded(name, alpha):
    apart = [torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])]
    assert distance(name, *apart, alpha=alpha) == pytest.approx(-math.log(alpha), rel=1e-5)
    assert distance("logits", *apart) > 99


@pytest.mark.parametrize("classes", range(1, CLASSES + 1))
def test_the_top_classes_and_the_rest_lose_less_than_all_do(classes):
    p, q = draw(1, 9, CLASSES), draw(2, 9, CLASSES)
    losses = [distance("top", q, p, classes=count) for count in (classes, CLASSES)]
    assert 0 < losses[0] <= losses[1] + 1e-6
    assert losses[1] == pytest.approx(distance("logits", q, p), rel=1e-4)


def test_recalibrated_top_classes_are_less_sure():
    p, q = draw(1, 9, CLASSES) * 3, draw(2, 9, CLASSES) * 3
    losses = [distance("top", q, p, classes=3, recalibrate=softened) for softened in (0.1, 0.3, 100.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_distribution_that_is_kept_whole_has_all_of_the_divergence(seed):
    q, p = (3 * draw(one, 9, 40) for one in (seed, seed + 20))
    forward = distance("logits", q, p)
    whole = LOSSES["dac_kl"](mass=1.0)
    assert whole.compare(q, p, own=whole.learned(WIDTHS)).item() == pytest.approx(forward, rel=1e-4)
    logs = [one.log_softmax(-1).sort(-1, descending=True).values for one in (p, q)]
    found = clipped_kl(*logs, torch.zeros(9, 1), torch.ones(9, 1))
    torch.testing.assert_close(found, kl(*logs), rtol=1e-4, atol=1e-5)


def test_a_clipped_divergence_is_that_of_what_is_left_and_one_class():
    # Of 0.5, 0.25, 0.125, ... the quantiles 0.25 and 0.75 keep half of the first class and all of the second.
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    q = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    found = clipped_kl(p, q, torch.tensor([[0.25]]), torch.tensor([[0.75]]))
    left = torch.tensor([0.25, 0.25, 0.5]), torch.tensor([0.2, 0.3, 0.5])
    assert found.item() == pytest.approx(kl(*(one.log() for one in left)).item(), rel=1e-5)
    first = clipped_kl(p, q, torch.tensor([[0.0]]), torch.tensor([[0.5]]))
    assert first.item() == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6), rel=1e-5)


def test_the_network_that_clips_learns_to_cut_and_leaves_what_it_must():
    q, p, loss = 3 * draw(1, 9, 40), 3 * draw(2, 9, 40), LOSSES["dac_kl"](mass=0.6)
    own = loss.learned(WIDTHS)
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), loss.learned(WIDTHS).parameters(), strict=True))
    optimizer = torch.optim.Adam(own.parameters(), 0.05)
    found = []
    for _ in range(60):
        found.append(loss.compare(q, p, own=own))
        found[-1].backward()
        assert all(one.grad.abs().max() > 0 for one in own.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < found[-1] < 0.9 * found[0]
    with torch.no_grad():
        whole = loss.compare(q, p, own=own).item()
    assert whole == pytest.approx(distance("logits", q, p), rel=1e-5), "a validation is by all of the distribution"


def test_by_a_clipped_divergence_the_student_comes_near_in_all_of_the_distribution():
    q, p, loss = (3 * draw(1, 9, 40)).requires_grad_(), 3 * draw(2, 9, 40), LOSSES["dac_kl"]()
    own, before = loss.learned(WIDTHS), distance("logits", q.detach(), p)
    optimizer = torch.optim.Adam([q, *own.parameters()], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss.compare(q, p, own=own).backward()
        optimizer.step()
    assert distance("logits", q.detach(), p) < 0.25 * before


def test_raised_logits_keep_their_order_and_lead():
    logits = draw(1, 9, 12)
    logits -= logits.mean(-1, keepdim=True)
    top = logits.topk(3, -1).indices
    assert torch.equal(amplified(logits, top, 0.0, 0.0), logits)
    raised = amplified(logits, top, 0.5, 0.1)
    assert torch.equal(raised.argsort(-1)[:, -3:], logits.argsort(-1)[:, -3:])
    beyond = torch.ones_like(logits, dtype=torch.bool).scatter(-1, top, False)
    assert torch.equal(raised[beyond], logits[beyond])
    high = logits.gather(-1, top)
    lead = high.mean(-1) - logits[beyond].view(9, 9).mean(-1)
    torch.testing.assert_close(raised.gather(-1, top)[:, 0], 1.5 * high[:, 0] + 0.1 * lead)


def test_directions_of_logits_ignore_their_size_and_rows_do_not():
    p, q = draw(1, 9, 12), draw(2, 9, 12)
    bare, whole = ({"scale": 0.0, "lift": 0.0, "contrast": contrast} for contrast in (0.0, 1.0))
    assert distance("topkd", 3 * q, p, **bare) == pytest.approx(distance("topkd", q, p, **bare), rel=1e-4)
    assert distance("topkd", 3 * p, p, **bare) == pytest.approx(0, abs=1e-5)
    assert distance("topkd", 3 * q, p, **whole) != pytest.approx(distance("topkd", q, p, **whole), rel=1e-2)
    raised = {**bare, "scale": 1.0}
    assert distance("topkd", p, p, **raised) > 1e-3, "the goal is more than the teacher"
    two = [one[:, :2].clone().requires_grad_() for one in (q, p)]
    LOSSES["topkd"](**bare).compare(*two).backward()
    assert two[0].grad.abs().max() < 1e-5, "of two classes a cosine says nothing"
    assert distance("topkd", p, p) < distance("topkd", p.roll(1, 0), p)


def test_plackett_luce_of_two_classes_is_a_choice_between_them():
    # The last of a list is no choice any more, so only the first pays: minus log q, weighed by p.
    p, q = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.1]])
    assert distance("pld", q, p) == pytest.approx(-float(p.softmax(-1)[0, 0] * q.log_softmax(-1)[0, 0]))


def test_plackett_luce_asks_for_the_order():
    p = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert distance("pld", p * 5, p) < distance("pld", p, p) < distance("pld", p.flip(-1), p)


def test_a_sinkhorn_plan_has_equal_sums():
    found = plan(draw(1, 8, 8).abs(), 0.1, 200)
    for dim in (0, 1):
        torch.testing.assert_close(found.sum(dim), torch.ones(8), rtol=1e-3, atol=1e-3)
    assert distance("sinkhorn", draw(1, 1, CLASSES), draw(1, 1, CLASSES)) == 0
    sure = 20 * torch.eye(CLASSES)
    assert distance("sinkhorn", sure, sure.flip(0)) == pytest.approx(0, abs=1e-3), "rows are carried to their like"
    assert distance("sinkhorn", sure, sure[:1].expand(CLASSES, -1)) > 1
    assert distance("sinkhorn", draw(1, 200, CLASSES), draw(2, 200, CLASSES), most=10) > 0


def test_taid_goes_from_the_student_to_the_teacher():
    q, p, loss = draw(1, 9, CLASSES).requires_grad_(), draw(2, 9, CLASSES), LOSSES["taid"](start=0.0)
    own = loss.learned(WIDTHS)
    first = loss.compare(q, p, own=own, share=0.0)
    (gradient,) = torch.autograd.grad(first, q)
    assert first.abs() < 1e-6
    assert gradient.abs().max() < 1e-6
    own.t.fill_(1.0)
    forward = distance("logits", q, p)
    assert loss.compare(q, p, own=own, share=1.0).item() == pytest.approx(forward, rel=1e-5)
    own.t.fill_(0.5)
    assert 0 < loss.compare(q, p, own=own, share=0.5) < forward
    with torch.no_grad():
        assert loss.compare(q, p, own=own).item() == pytest.approx(forward, rel=1e-5), "a validation has the teacher"


def test_taid_holds_its_goal_still():
    # The gradient of KL(r || q) in the logits of q is q - r where r is no function of them.
    q, p, loss = draw(1, 1, CLASSES).requires_grad_(), draw(2, 1, CLASSES), LOSSES["taid"](start=0.3)
    (gradient,) = torch.autograd.grad(loss.compare(q, p, own=loss.learned(WIDTHS), share=0.0), q)
    goal = (0.7 * q + 0.3 * p).softmax(-1)
    torch.testing.assert_close(gradient, q.softmax(-1) - goal, rtol=1e-4, atol=1e-6)


def test_taid_rises_with_the_run_and_ahead_of_it_while_the_loss_falls():
    loss = LOSSES["taid"](rise=0.1, momentum=0.5)

    def after(losses: list[float]) -> float:
        own = loss.learned(WIDTHS)
        for value in losses:
            loss.advance(own, torch.tensor(value), 0.0)
        return own.t.item()

    assert after([1.0]) == pytest.approx(0.4)
    assert after([1.0, 1.0]) == pytest.approx(0.4 + 0.1 * 0.5 * 0.6)
    assert after([1.0, 2.0]) < after([1.0, 1.0]) < after([1.0, 0.1])
    own = loss.learned(WIDTHS)
    path = []
    for step in range(20):
        loss.advance(own, torch.tensor(1.0 / (step + 1)), step / 19)
        path.append(own.t.item())
    assert path == sorted(path)
    assert path[-1] == 1.0


@pytest.mark.parametrize("name", ["logits", "jsd"])
def test_the_rows_with_most_to_gain_are_kept(name):
    q, p = draw(1, 10, CLASSES), draw(2, 10, CLASSES)
    q[3] = p[3]  # nothing to gain
    full, kept = LOSSES[name](), LOSSES[name](keep=0.3)
    assert kept.compare(q, p) > full.compare(q, p) > 0
    logs = [one.log_softmax(-1) for one in (p, q)]
    assert 3 not in most_to_gain(*logs, None, 0.9)
    known = logs[1].clone()
    known[5] = logs[0][5]  # the reference learned this row alone
    assert most_to_gain(*logs, known, 0.1).tolist() == [5]
    teacher = Seen(MASK, predictions=p, reference=Seen(MASK, predictions=known))
    alone = LOSSES[name](keep=0.1).of(Seen(MASK, predictions=q), teacher)
    torch.testing.assert_close(alone, full.compare(q[5:6], p[5:6]))


# Subclasses.


def test_subclasses_sum_to_their_class_whatever_splits_it():
    logits, parts = draw(1, 9, CLASSES), 5 * draw(2, 9, CLASSES * 3)
    found = subclass_logs(logits, parts).unflatten(-1, (CLASSES, 3))
    torch.testing.assert_close(found.logsumexp(-1), logits.log_softmax(-1))
    torch.testing.assert_close(found.log_softmax(-1), parts.unflatten(-1, (CLASSES, 3)).log_softmax(-1))


def test_directions_of_subclasses_are_none_of_the_classes_and_vary_alike():
    weight, bias = splits(SAMPLE, 3, 0.5)
    assert weight.shape == (CLASSES * 3, READ)
    assert (weight @ SAMPLE.weight.T).abs().max() < 1e-5
    coordinates = (SAMPLE.features @ weight.T + bias).unflatten(-1, (CLASSES, 3))
    shares = SAMPLE.logits.softmax(-1)[..., None]
    means, squares = ((shares * one).sum(0) / shares.sum(0) for one in (coordinates, coordinates.square()))
    assert means.abs().max() < 1e-5, "each class has its centre"
    torch.testing.assert_close(squares.mean(-1), torch.full((CLASSES,), 4.0))  # 1 over the temperature, squared
    lengths = weight.unflatten(0, (CLASSES, 3)) @ weight.unflatten(0, (CLASSES, 3)).mT
    torch.testing.assert_close(lengths, lengths.diagonal(dim1=1, dim2=2).diag_embed(), rtol=1e-4, atol=1e-4)
    assert len(splits(SAMPLE, 50, 0.5)[0]) == CLASSES * (READ - CLASSES), "no more than directions are left"


def test_the_widest_directions_of_a_class_split_it():
    # Two classes told by the first channel; of the others one is wide in the first class, another in the second.
    features = draw(1, 400, 6) * 0.1
    first = torch.arange(400) < 200
    features[:, 0] = torch.where(first, 1.0, -1.0)
    features[first, 2] *= 50
    features[~first, 4] *= 50
    logits = 20 * torch.stack([features[:, 0], -features[:, 0]], -1)
    weight, _ = splits(Sample(features, logits, torch.tensor([[1.0], [-1.0]]) * torch.eye(6)[0]), 1, 1.0)
    assert weight.abs().argmax(-1).tolist() == [2, 4]


def test_what_subclasses_add_to_a_divergence_is_how_each_class_is_split():
    student, teacher, loss = show(tensors(1)), show(tensors(2)), LOSSES["lelp"](subclasses=3)
    own = loss.learned(WIDTHS)
    whole, classes = loss.of(student, teacher, own), LOSSES["logits"]().of(student, teacher)
    parts = [(one.read @ own.weight.T + own.bias).unflatten(-1, (CLASSES, 3)) for one in (teacher, student)]
    apart = (teacher.logits.softmax(-1) * kl(*(one.log_softmax(-1) for one in parts))).sum(-1).mean()
    torch.testing.assert_close(whole, classes + apart)
    assert torch.equal(own.student.weight, own.weight), "as the widths are the same"
    other = loss.learned(replace(WIDTHS, features=4))
    assert other.student.weight.shape == (CLASSES * 3, 4)
    assert other.student.weight.abs().max() == 0


# States and embeddings.


@pytest.mark.parametrize("name", ["hidden", "cosine", "graph", "embedding", "similarity", "leaf", "distances", "lead"])
def test_relative_losses_ignore_a_common_scale(name):
    scaled = [{**parts, "states": [7 * one for one in parts["states"]]} for parts in (tensors(1), tensors(2))]
    loss = LOSSES[name]()
    torch.testing.assert_close(
        loss.of(*map(show, scaled)), loss.of(show(tensors(1)), show(tensors(2))), rtol=1e-4, atol=1e-5
    )


def test_a_student_of_zeros_has_a_square_head_loss_of_one_a_block():
    states = tensors(2)["states"]
    zeros = [torch.zeros_like(one) for one in states]
    assert square_head(zeros, states, MASK).item() == pytest.approx(BLOCKS, abs=1e-5)
    small = [0.05 * one for one in states]
    assert square_head(zeros, small, MASK, OFFICIAL_EPSILON) < 0.5 * square_head(zeros, small, MASK)


def test_square_head_in_bfloat16_keeps_small_differences():
    teacher = [one.bfloat16() for one in tensors(2)["states"]]
    student = [one.float() * (1 + 1e-4) for one in teacher]
    assert square_head(student, teacher, MASK).item() == pytest.approx(BLOCKS * 1e-8, rel=0.05)


def test_token_distance_is_a_sum_over_width_and_a_mean_over_tokens_and_blocks():
    states = tensors(2)["states"]
    assert token_distance([one + 2.0 for one in states], states, MASK).item() == pytest.approx(4 * WIDTH, rel=1e-5)


def turned(parts: dict[str, list[torch.Tensor]], seed: int = 3) -> dict[str, list[torch.Tensor]]:
    turn = torch.linalg.qr(draw(seed, WIDTH, WIDTH)).Q
    return {**parts, "states": [one @ turn for one in parts["states"]]}


@pytest.mark.parametrize("name", ["graph", "similarity", "distances", "angles", "lead"])
def test_relations_ignore_a_turn_of_all_states(name):
    student, teacher, loss = tensors(1), show(tensors(2)), LOSSES[name]()
    torch.testing.assert_close(loss.of(show(turned(student)), teacher), loss.of(show(student), teacher))
    assert loss.of(show(turned(tensors(2))), teacher) < 1e-6


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_relational_losses_ignore_scale_and_shift(loss):
    student, teacher = draw(1, 6, WIDTH), draw(2, 6, WIDTH)
    torch.testing.assert_close(loss(3 * student + 5, teacher), loss(student, teacher), rtol=1e-4, atol=1e-5)
    assert loss(3 * teacher + 5, teacher) < 1e-8


def test_the_angles_of_a_square_are_known():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    # Corners of a square have cosines 0, 1/sqrt 2, 1/sqrt 2; those of a line 1, 1 and -1, where a point lies between.
    corners = torch.tensor([0.0, 0.5**0.5, 0.5**0.5])
    assert rkd_angle(square, square) == 0
    assert 0.5 * (corners - 1).square().mean() < rkd_angle(line, square) < 0.5 * (corners + 1).square().mean()


def test_similarity_ignores_the_length_of_embeddings():
    student, teacher = draw(1, 5, WIDTH), draw(2, 5, WIDTH)
    scaled = student * torch.arange(1.0, 6.0)[:, None]
    torch.testing.assert_close(similarity_distance(scaled, teacher), similarity_distance(student, teacher))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_information_in_common_is_bounded_by_the_batch(alpha):
    apart = torch.eye(8)
    own, other = (mutual_information(one, apart, 0.05, alpha).item() for one in (apart, draw(1, 8, 8)))
    assert other < own == pytest.approx(math.log(8 / alpha), rel=1e-4)


def test_at_alpha_one_information_is_what_telling_apart_leaves_of_the_batch():
    student, teacher = draw(1, 8, WIDTH), draw(2, 8, WIDTH)
    found = mutual_information(student, teacher, 0.5, 1.0).item()
    assert found == pytest.approx(math.log(8) - info_nce(teacher, student, 0.5).item(), abs=1e-5)


def test_the_graph_of_a_text_is_a_mean_over_pairs_and_blocks():
    square, mask = torch.eye(2)[None], torch.ones(1, 2, dtype=torch.bool)
    alike = torch.ones(1, 2, 2)
    assert graph_distance([square], [alike], mask).item() == pytest.approx(0.5)  # of four pairs two differ by 1
    assert graph_distance([square, square], [alike, alike], mask).item() == pytest.approx(0.5)


def test_no_text_is_its_own_neighbour():
    student, teacher = torch.eye(3), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    sure = lead(student, teacher, 0.02).item()
    # The first two have one likeness each, the third none; the student is undecided between two others throughout.
    assert sure == pytest.approx(2 / 3 * math.log(2), rel=1e-4)


def test_pooling_is_the_mean_of_real_tokens():
    states = tensors(1)["states"][0]
    torch.testing.assert_close(pooled(states, MASK)[1], states[1, :4].mean(0))


# Attention.


def test_relations_ignore_a_turn_inside_a_relation_head():
    student, teacher, turn = tensors(1), show(tensors(2)), torch.linalg.qr(draw(3, 3, 3)).Q
    loss = LOSSES["relations"](heads=2)
    spun = {**student, "heads": [one @ turn for one in student["heads"]]}
    torch.testing.assert_close(loss.of(show(spun), teacher), loss.of(show(student), teacher))
    across = torch.linalg.qr(draw(4, 6, 6)).Q
    mixed = {**student, "heads": [relation_heads(relation_heads(one, 1) @ across, 2) for one in student["heads"]]}
    assert abs(loss.of(show(mixed), teacher) - loss.of(show(student), teacher)) > 1e-4


def test_relation_heads_are_as_many_as_divide_both_widths():
    heads = draw(1, BATCH, 2, LENGTH, 6)
    assert relation_heads(heads, 4).shape == (BATCH, 4, LENGTH, 3)
    assert torch.equal(relation_heads(heads, 2), heads)
    student = Seen(MASK, heads=Heads(*draw(2, 3, BATCH, 3, LENGTH, 2)))
    teacher = Seen(MASK, heads=Heads(*draw(3, 3, BATCH, 2, LENGTH, 2)))
    two = LOSSES["relations"](heads=2).of(student, teacher)
    assert torch.equal(LOSSES["relations"](heads=48).of(student, teacher), two), "of widths 6 and 4"


def test_directions_ignore_sizes_and_are_known_by_their_cosine():
    student, teacher = tensors(1), show(tensors(2))
    loss = LOSSES["directions"]()
    found = loss.of(show(student), teacher)
    longer = {**student, "heads": [3.0 * one for one in student["heads"]]}
    torch.testing.assert_close(loss.of(show(longer), teacher), found)
    pairs = [[likeness(one, MASK).flatten() for one in parts["heads"]] for parts in (student, tensors(2))]
    expected = sum((2 - 2 * (mine @ theirs)).sqrt() for mine, theirs in zip(*pairs, strict=True))
    torch.testing.assert_close(found, expected)


def test_causal_attention_sees_no_later_token():
    found = relation(*draw(1, 2, BATCH, 2, LENGTH, 3), MASK, True).exp()
    assert found[..., 0, 1:].abs().max() == 0
    torch.testing.assert_close(found[..., 0, 0], torch.ones(BATCH, 2))


LONE = [name for name, one in TINY.items() if one.inputs != "image"]


@pytest.mark.parametrize("name", LONE)
def test_a_lone_token_takes_in_its_own_value(name):
    # It has nothing else to look at, so what the output projection reads are the values: any family's are found.
    model = TINY[name].build()
    found = tap(model, layout_of(model))
    inputs = {
        key: one[:1, :1] if key.endswith(("ids", "mask")) else one[:1] for key, one in TINY[name].example().items()
    }
    read = []
    reader = next(site for site in found.axis.readers if site.module.startswith(found.axis.block or block_of(found)))
    model.get_submodule(reader.module).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad(), found.open() as outputs:
        model(**inputs)
    heads = found.heads(outputs)
    assert heads.queries.shape[1] == found.count
    values = heads.values.repeat_interleave(found.count // heads.values.shape[1], 1)
    torch.testing.assert_close(values.transpose(1, 2).flatten(2), read[0].reshape(1, 1, -1))


def block_of(found) -> str:
    """The block of an attention whose heads are shared by all."""
    return found.sites[0].module.rpartition(".")[0]


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "gpt2", "opt", "bert-decoder"])
def test_where_positions_are_added_relations_are_the_attention(name):
    model = TINY[name].build("eager")
    found, inputs = tap(model, layout_of(model)), TINY[name].example()
    with torch.no_grad(), found.open() as outputs:
        seen = model(**inputs, output_attentions=True).attentions[-1]
    heads, mask = found.heads(outputs), inputs["attention_mask"].bool()
    ours = attention(heads, mask).exp()
    torch.testing.assert_close(ours.transpose(1, 2)[mask], seen.transpose(1, 2)[mask], rtol=1e-4, atol=1e-5)


# Ranking.


def test_margins_are_those_of_all_pairs():
    student, teacher = draw(1, 6, 1), draw(2, 6, 1)
    both = [(one - one.T)[~torch.eye(6, dtype=torch.bool)] for one in (student, teacher)]
    torch.testing.assert_close(margin_mse(student, teacher), (both[0] - both[1]).square().mean())
    torch.testing.assert_close(margin_mse(student + 9, teacher), margin_mse(student, teacher), rtol=1e-4, atol=1e-4)


def test_a_list_is_a_distribution_over_its_rows():
    student, teacher = draw(1, 6, 1), draw(2, 6, 1)
    torch.testing.assert_close(listwise_kl(student, teacher), logit_kl(student.T, teacher.T))


# In a plan.


def test_readme_lists_every_loss():
    rows = (Path(__file__).parents[1] / "README.md").read_text().partition("| losses |")[2].partition("\n\n")[0]
    named = [name for row in rows.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(LOSSES)


def test_a_plan_is_told_wrong_losses_with_line_and_nearest_name():
    text = (
        "model: m\npasses:\n  - distill:\n      losses:\n        hiden: 1\n        jsd: {bta: 1}\n        top: five\n"
    )
    with pytest.raises(PlanError) as raised:
        Plan.read(text, Tables(PASSES, EXPORTERS))
    told = str(raised.value)
    for words in (
        ":5: passes[0].distill.losses.hiden: unknown option; expected one of hidden, tokens,",
        "(did you mean 'hidden'?)",
        ":6: passes[0].distill.losses.jsd.bta: unknown option; expected one of weight, temperature, keep, beta",
        ":7: passes[0].distill.losses.top: met 'five'; expected its weight, or options such as {weight: 1}",
    ):
        assert words in told


def test_the_schema_knows_every_loss_and_its_options():
    jsonschema = pytest.importorskip("jsonschema", reason="the package that validates against JSON schemas")
    validator = jsonschema.Draft202012Validator(schema(Tables(PASSES, EXPORTERS)))

    def fits(**losses) -> bool:
        return validator.is_valid({"passes": [{"distill": {"losses": losses}}]})

    for name in LOSSES:
        assert fits(**{name: 1})
        assert fits(**{name: {"weight": 0.5}})
        assert not fits(**{name: {"wight": 0.5}})
        assert not fits(**{name: "much"})
    assert fits(jsd={"beta": 0.5}, logits={"weight": 1, "temperature": 2})
    assert not fits(jsd={"beta": 1.5})
    assert not fits(hiden=1)


def test_losses_are_told_by_weight_or_options():
    told = Losses(hidden=2, logits={"temperature": 3.0}, jsd={"weight": 0.5, "beta": 0.1}, task=0)
    assert list(told.chosen()) == ["hidden", "logits", "jsd"]
    assert [loss.weight for loss in told.chosen().values()] == [2, 1, 0.5]
    written = {"hidden": 2.0, "logits": {"temperature": 3.0}, "jsd": {"weight": 0.5, "beta": 0.1}, "task": 0.0}
    assert told.model_dump(exclude_defaults=True) == written
    assert Losses(**written) == told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"hidden": True}, "expected its weight"),
        ({"hidden": "1"}, "expected its weight"),
        ({"hidden": -1}, "greater than or equal to 0"),
        ({"hidden": 0}, "every loss has a weight of 0"),
        ({}, "every loss has a weight of 0"),
        ({"jsd": {"beta": 1}}, "less than 1"),
        ({"jsd": {"alpha": 1}}, "Extra inputs"),
        (["hidden"], "expected losses with their weights"),
    ],
)
def test_wrong_losses_are_refused(given, told):
    with pytest.raises(ValidationError, match=told):
        Distill(losses=given)
