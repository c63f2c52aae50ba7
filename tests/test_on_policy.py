"""On-policy distillation: the student's own words are trained on, drawn alike for the same step, without a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from compress.data.batches import IGNORED
from compress.errors import TrainingError
from compress.writing import write_on
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.distillation.distill import Distill
from passes.distillation.on_policy import OnPolicy, own_words
from tests.test_distill import distill, make_state, prune
from tests.world import power_cut

ENDS = {3}


def answers() -> dict[str, torch.Tensor]:
    """Two questions of 3 and 5 tokens, with answers of 4 and 1."""
    ids = torch.arange(10, 24).reshape(2, 7)
    ids[1, 6] = 0
    labels = ids.clone()
    labels[0, :3] = labels[1, :5] = labels[1, 6:] = IGNORED
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def packed() -> dict[str, torch.Tensor]:
    ids = torch.arange(10, 26).reshape(2, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.fixture
def state(tmp_path):
    return make_state(tmp_path, "text-generation")


@pytest.mark.parametrize(
    ("batch", "starts"), [(answers(), [3, 5]), (packed(), [3, 3])], ids=["questions", "running text"]
)
def test_the_student_writes_on_from_where_the_labels_begin(state, batch, starts):
    found = own_words(batch, state.model, ENDS, 5, 0.0)
    prompts = [row[:start].tolist() for row, start in zip(batch["input_ids"], starts, strict=True)]
    expected = write_on(state.model, prompts, most=5, ends=ENDS)
    for row, (prompt, words) in enumerate(zip(prompts, expected, strict=True)):
        real = found["attention_mask"][row].bool()
        assert found["input_ids"][row][real].tolist() == prompt + words
        assert found["labels"][row][real].tolist() == [IGNORED] * len(prompt) + words
        assert (found["labels"][row][~real] == IGNORED).all()


def test_a_text_of_fewer_tokens_than_are_written_keeps_its_first(state):
    found = own_words(packed(), state.model, ENDS, 30, 1.0)
    assert found["input_ids"][:, 0].tolist() == [10, 18]
    assert (found["labels"][:, 1] != IGNORED).all()


def test_no_more_is_written_than_the_model_can_read(state):
    found = own_words(answers(), state.model, (), 500, 1.0)
    assert found["attention_mask"].sum(1).tolist() == [64 - 2, 64]


def test_lots_and_words_are_those_of_the_seed(state):
    step = OnPolicy(fraction=0.3, tokens=2)

    def turned(seed):
        torch.manual_seed(seed)
        return step.turn(packed(), state.model, ENDS)

    found = [turned(seed) for seed in range(200)]
    again = [turned(seed) for seed in range(200)]
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(found, again, strict=True))
    written = sum((batch["labels"][:, 0] == IGNORED).all().item() for batch in found)
    assert 40 < written < 80


def test_the_teacher_is_compared_on_what_was_written_alone(state):
    with torch.no_grad():
        state.model.lm_head.weight.mul_(0.5)
    batch = own_words(answers(), state.model, ENDS, 5, 1.0)
    found = Comparison(Losses(reverse=1), state).losses(state.model, batch)["reverse"]
    known = {name: batch[name] for name in ("input_ids", "attention_mask")}
    p, q = (one(**known).logits.log_softmax(-1) for one in (state.teacher, state.model))
    rows = [(q[row, at].exp() * (q[row, at] - p[row, at])).sum() for row, at in _before(batch["labels"])]
    torch.testing.assert_close(found, torch.stack(rows).mean())


def _before(labels):
    """The place before each label, which is where it is predicted."""
    return [(row, place - 1) for row, place in (labels != IGNORED).nonzero().tolist()]


def test_recovery_in_its_own_words_brings_the_student_nearer(state, tmp_path):
    prune(state)
    before = copy.deepcopy(state.model)
    after = distill(state, losses={"jsd": 1}, on_policy={"fraction": 1.0, "tokens": 12})
    other = make_state(tmp_path, "text-generation")
    other.model = before
    plain = distill(other, steps=1, losses={"jsd": 1})
    assert after.figures["loss_before"] == plain.figures["loss_before"], "it is validated on the data"
    assert after.figures["loss_after"] < 0.8 * after.figures["loss_before"]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    options = {"steps": 12, "losses": {"logits": 1}, "on_policy": {"fraction": 0.6, "tokens": 8}, "checkpoint_every": 4}

    def pruned(name):
        (tmp_path / name).mkdir(exist_ok=True)
        state = make_state(tmp_path / name, "text-generation")
        prune(state)
        return state

    straight = distill(pruned("straight"), **options)
    with power_cut(Comparison, "losses", 6):
        distill(pruned("killed"), **options)
    resumed = distill(pruned("killed"), **options)
    assert straight.figures["best_step"] > 4
    assert all(torch.equal(one, resumed.model.state_dict()[name]) for name, one in straight.model.state_dict().items())
    assert straight.figures["history"] == resumed.figures["history"]


def test_labels_are_none_for_what_the_student_wrote():
    with pytest.raises(ValidationError, match="expected losses without task"):
        Distill(losses={"task": 1}, on_policy={})


def test_a_model_that_does_not_write_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"on_policy lets the student write.*fill-mask"):
        distill(make_state(tmp_path, "fill-mask"), on_policy={})
