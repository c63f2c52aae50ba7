"""Predictions that are never multiplied out: the same losses and gradients as of logits that are, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from passes.distillation import chunked
from passes.distillation.choice import Losses
from passes.distillation.chunked import Held, cross_entropy, headless, linear_head, next_token, projected, summed
from passes.distillation.compare import Comparison
from passes.distillation.losses import LOSSES
from passes.distillation.losses.base import Reads, Seen
from passes.distillation.losses.predictions import Projected
from tests.conftest import GENERATING, TINY
from tests.test_distill import make_state, prune

ROWS, WIDTH, CLASSES = (3, 7), 5, 11
MASK = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
BY_ROWS = [name for name, cls in LOSSES.items() if cls.reads & Reads.PREDICTIONS and cls().by_rows]
ONE, ALL = Held(1, 1), Held(10**6, 10**6)  # rows at a time: one or all
SOME = Held(5 * CLASSES, 2 * CLASSES)  # five, and two of them, which divide nothing


def leaves(seed: int, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return found[0], found[1], found[2] if bias else None


def same_gradients(one: torch.Tensor, other: torch.Tensor, inputs) -> None:
    wanted = [given for given in inputs if given is not None]
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(3.0 * loss, wanted) for loss in (one, other)]
    torch.testing.assert_close(*both, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("held", [ONE, SOME, ALL])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_and_its_gradients_are_the_plain_ones(held, bias, monkeypatch):
    monkeypatch.setitem(chunked.HELD, "cpu", held)
    states, weight, shift = leaves(1, bias)
    labels = torch.randint(CLASSES, (MASK.sum(),), generator=torch.Generator().manual_seed(2))
    found = cross_entropy(Projected(states, weight, shift).counted(MASK), labels)
    plain = functional.cross_entropy(functional.linear(states[MASK], weight, shift), labels)
    same_gradients(found, plain, (states, weight, shift))


@pytest.mark.parametrize("held", [ONE, SOME, ALL])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_gradients_are_the_plain_ones(held, temperature, monkeypatch):
    monkeypatch.setitem(chunked.HELD, "cpu", held)
    inputs, teacher = leaves(1), [one.detach() for one in leaves(2)]
    both = [Seen(MASK, predictions=Projected(*parts), counted=MASK) for parts in (inputs, teacher)]
    found = LOSSES["logits"](temperature=temperature).of(*both)
    mine, theirs = (functional.linear(*parts)[MASK] / temperature for parts in (inputs, teacher))
    plain = functional.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    same_gradients(found, plain * temperature**2, inputs)


@pytest.mark.parametrize("name", BY_ROWS)
def test_a_loss_by_rows_is_the_same_in_parts(name, monkeypatch):
    monkeypatch.setitem(chunked.HELD, "cpu", SOME)
    inputs, teacher, loss = leaves(1), [one.detach() for one in leaves(2)], LOSSES[name]()
    both = [Seen(MASK, predictions=Projected(*parts), counted=MASK) for parts in (inputs, teacher)]
    plain = loss.compare(*(functional.linear(*parts)[MASK] for parts in (inputs, teacher)))
    same_gradients(loss.of(*both), plain, inputs)


def test_no_rows_lose_nothing():
    states, weight, bias = leaves(1)
    found = cross_entropy(Projected(states[0, :0], weight, bias), torch.zeros(0, dtype=torch.long))
    found.backward()
    assert found == 0
    assert weight.grad.abs().max() == 0


def test_at_most_so_many_logits_exist(monkeypatch):
    monkeypatch.setitem(chunked.HELD, "cpu", SOME)
    states, weight, _ = leaves(1)
    places, asked = torch.arange(21), []

    def loss(logits, part):
        asked.append(part.tolist())
        assert logits.shape == (len(part), CLASSES)
        return logits.square().sum()

    summed(loss, Projected(states.flatten(0, 1), weight), places)
    assert [len(one) for one in asked] == [2, 2, 1] * 4 + [1]
    assert [row for part in asked for row in part] == places.tolist()


def test_what_wants_no_gradient_costs_none():
    states, weight, bias = leaves(1)
    labels = torch.zeros(21, dtype=torch.long)
    rows = Projected(states.flatten(0, 1), weight.detach(), bias.detach())
    cross_entropy(rows, labels).backward()
    assert states.grad.abs().max() > 0
    with torch.no_grad():
        assert not cross_entropy(rows, labels).requires_grad


def test_half_precision_is_summed_in_single(monkeypatch):
    monkeypatch.setitem(chunked.HELD, "cpu", ONE)
    states, weight, _ = (one.detach().bfloat16().requires_grad_() for one in leaves(1))
    labels = torch.arange(21) % CLASSES
    found = cross_entropy(Projected(states.flatten(0, 1), weight), labels)
    found.backward()
    assert found.dtype == torch.float32
    plain = functional.cross_entropy((states.flatten(0, 1) @ weight.T).float(), labels)
    torch.testing.assert_close(found, plain)
    both = states.grad.clone(), weight.grad.clone()
    assert {one.dtype for one in both} == {torch.bfloat16}
    states.grad = weight.grad = None
    plain.backward()
    torch.testing.assert_close(both, (states.grad, weight.grad), rtol=0.02, atol=1e-3)


# Models.


@pytest.mark.parametrize("name", [name for name in GENERATING if TINY[name].auto == "AutoModelForCausalLM"])
def test_without_its_head_a_model_says_the_same(name):
    model, inputs = TINY[name].build(), TINY[name].example()
    head = linear_head(model)
    assert head is not None
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain = model(**inputs, labels=labels)
    with headless(head):
        predictions = projected(model(**inputs).logits, head)
    torch.testing.assert_close(predictions.counted(labels >= 0)[:], plain.logits[labels >= 0])
    torch.testing.assert_close(next_token(predictions, labels), plain.loss)
    torch.testing.assert_close(model(**inputs).logits, plain.logits)


def test_a_head_that_something_comes_after_is_let_be():
    model = TINY["gemma3"].build()
    model.config.final_logit_softcapping = 5.0
    assert linear_head(model) is None
    assert linear_head(TINY["llama"].build()) is not None
    other = TINY["llama"].build()
    other.loss_function = lambda *args, **kwargs: torch.tensor(1.0)
    assert linear_head(other) is None


@pytest.mark.parametrize(
    "losses", [{"logits": 1}, {"logits": {"temperature": 2}, "task": 0.5, "hidden": 1}, {"task": 1}]
)
@pytest.mark.parametrize("half", [False, True])
def test_recovery_never_sees_all_logits_and_loses_the_same(tmp_path, monkeypatch, losses, half):
    monkeypatch.setitem(chunked.HELD, "cpu", Held(300, 100))
    state = make_state(tmp_path, "text-generation")
    prune(state)
    batch = next(iter(state.data.batches("train", 8)))
    spared = Comparison(Losses(**losses), state)
    assert None not in spared.heads
    plain = copy.copy(spared)
    plain.heads = (None, None)
    found = []
    for compare in (spared, plain):
        state.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            given = compare.losses(compare.student, batch)
        sum(given.values()).backward()
        found.append((given, {name: one.grad for name, one in state.model.named_parameters() if one.grad is not None}))
    closeness = {"rtol": 0.05, "atol": 0.02} if half else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(*found, **closeness)


def test_losses_that_look_across_rows_see_all(tmp_path):
    state = make_state(tmp_path, "text-generation")
    for losses in ({"sinkhorn": 1}, {"taid": 1, "task": 1}, {"logits": {"keep": 0.5}}, {"hidden": 1}):
        assert Comparison(Losses(**losses), state).heads == (None, None)


def test_a_wrapped_student_uses_its_head_itself(tmp_path):
    state = make_state(tmp_path, "text-generation")
    prune(state)
    compare = Comparison(Losses(logits=1, task=1), state)
    given = []
    compare.heads[0].register_forward_hook(lambda module, inputs, output: given.append(output.shape[-1]))
    batch = next(iter(state.data.batches("train", 8)))

    class Wrapped(torch.nn.Module):
        def forward(self, **inputs):
            return state.model(**inputs)

    found = [compare.losses(student, batch) for student in (compare.student, Wrapped())]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert given == [state.model.config.hidden_size, state.model.config.vocab_size]
