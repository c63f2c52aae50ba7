"""Teach: what a teacher said is drawn without bias, stored shard by shard, and enough to recover by without it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from compress.contract import PREDICTIONS, STATES
from compress.data import Data
from compress.errors import PlanError, TrainingError
from compress.plan import Plan, Tables
from compress.runner import Run, prepare
from compress.state import Teacher
from exporters import EXPORTERS
from passes import PASSES
from passes.distillation import lesson, taught
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.distillation.losses import LOSSES
from passes.distillation.losses.predictions import Draws
from passes.distillation.taught import Taught, draw, entries
from passes.distillation.teach import Teach
from tests.test_distill import distill, make_state, prune
from tests.world import make_world, power_cut

CLASSES, SAMPLES = 50, 8
DRAWN = [name for name, cls in LOSSES.items() if cls.drawn]
STARTS = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000  # all that a start can be, evenly


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.5 * torch.randn(rows, CLASSES, dtype=torch.float64, generator=generator)


def spread(draws: Draws) -> torch.Tensor:
    """The mean over the rows of the distributions that draws stand for: (classes,)."""
    rows = torch.zeros(len(draws), CLASSES, dtype=torch.float64)
    return rows.scatter_add_(1, draws.ids, draws.weights.double()).mean(0)


def mean_gradient(name: str, q: torch.Tensor, teacher, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss and its gradient in the logits of one row, averaged over as many draws as the teacher has rows."""
    q = q.clone().requires_grad_()
    loss = LOSSES[name](**options).compare(q.expand(len(teacher), -1), teacher)
    return loss.detach(), torch.autograd.grad(loss, q)[0]


# Draws.


@pytest.mark.parametrize("proposal", [1.0, 1.7])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_have_no_bias_and_the_likeliest_tokens_have(temperature, proposal):
    p = (logits(1) / temperature).softmax(-1)[0]
    drawn = spread(draw(logits(1).expand(len(STARTS), -1), STARTS, SAMPLES, temperature, proposal))
    torch.testing.assert_close(drawn, p, rtol=0.02, atol=1e-4)
    top = p.topk(SAMPLES)
    truncated = torch.zeros_like(p).scatter_(0, top.indices, top.values / top.values.sum())
    bias = [float((one - p).abs().sum() / 2) for one in (drawn, truncated)]  # probability that stands elsewhere
    assert bias[1] > 0.05 > 50 * bias[0]


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("proposal", [1.0, 1.7])
def test_a_loss_by_draws_has_on_average_the_gradient_of_the_whole_and_by_the_likeliest_has_not(name, proposal):
    p, q = logits(1), logits(2)
    value, gradient = mean_gradient(name, q, p)
    draws = draw(p.expand(len(STARTS), -1), STARTS, SAMPLES, 1.0, proposal)
    mean, slope = mean_gradient(name, q, draws)
    assert mean == pytest.approx(float(value), rel=0.01)
    top = p.log_softmax(-1).topk(SAMPLES)
    weights = top.values.exp() / top.values.exp().sum()
    _, truncated = mean_gradient(name, q, Draws(top.indices, weights, top.values))
    bias = [float((one - gradient).norm() / gradient.norm()) for one in (slope, truncated)]
    assert bias[1] > 0.05 > 10 * bias[0]


def test_one_draw_alone_is_no_estimate_but_draws_converge():
    p = logits(1).softmax(-1)
    one = draw(logits(1), STARTS[:1], SAMPLES)
    assert (spread(one) - p).abs().max() > 0.01
    errors = [(spread(draw(logits(1), STARTS[7:8], samples)) - p).abs().sum() for samples in (8, 64, 512)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_a_twin_loses_nothing_by_draws():
    for name in DRAWN:
        value, _ = mean_gradient(name, logits(1), draw(logits(1), STARTS[:1], SAMPLES))
        assert abs(value) < 1e-12


def test_classes_of_no_probability_are_never_drawn():
    sure = torch.full((3, CLASSES), -1e4)
    sure[:, 7] = 0
    draws = draw(sure, torch.tensor([0.0, 0.5, 1.0 - 1e-12], dtype=torch.float64), SAMPLES)
    assert draws.ids.unique().tolist() == [7]


def test_equal_draws_are_one_entry():
    draws = draw(logits(1, 5), STARTS[::400], 64)
    found = entries(draws, CLASSES)
    assert found["ids"].dtype == torch.uint16
    assert entries(draws, 2**17)["ids"].dtype == torch.int32
    rows = torch.arange(5).repeat_interleave(found["counts"].long())
    whole = torch.zeros(5, CLASSES, dtype=torch.float64)
    pairs = found["ids"].long(), found["weights"].double()
    assert len(set(zip(rows.tolist(), pairs[0].tolist(), strict=True))) == len(rows) < 5 * 64
    whole.index_put_((rows, pairs[0]), pairs[1])
    torch.testing.assert_close(whole, torch.zeros(5, CLASSES).double().scatter_add_(1, draws.ids, draws.weights))
    torch.testing.assert_close(
        found["logs"].float(), logits(1, 5).log_softmax(-1)[rows, pairs[0]].float(), rtol=1e-3, atol=0
    )


# The store.


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(taught, "SHARD_TOKENS", 150)


def teach(state, **options):
    (after,) = Teach(**{"samples": SAMPLES, "batch_size": 8, **options}).run(state)
    return after


def read(state) -> Taught:
    fact = state.facts.get(PREDICTIONS.name) or state.facts[STATES.name]
    return Taught([fact], state.workshop.run, state.data)


@pytest.mark.parametrize("task", ["text-generation", "token-classification", "text-classification"])
def test_what_is_read_back_is_what_the_teacher_shows_row_by_row(tmp_path, task, small_shards):
    state = teach(make_state(tmp_path, task), states=[0, -1], samples=64)  # so many that predictions are kept whole
    assert len(list((state.workshop.run / state.facts["states"]["folder"]).glob("train-*"))) > 3
    compare = Comparison(Losses(hidden=1, reverse=1), state)
    for split in taught.SPLITS:
        for batch in read(state).batches(split, 7, seed=3):
            said, shown = read(state).seen(batch), compare.look_at_teacher(batch, None)[0]
            mask = said.mask
            wanted = shown.predictions[mask] if shown.predictions.ndim == 3 else shown.predictions
            found = said.predictions[mask] if said.predictions.ndim == 3 else said.predictions
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            assert said.states[1] is None
            for block in (0, 2):
                close = {"rtol": 2e-3, "atol": 2e-3}
                torch.testing.assert_close(said.states[block][mask].float(), shown.states[block][mask], **close)


def test_draws_are_of_their_row_in_whatever_batch(tmp_path, small_shards):
    made = [teach(make_state(tmp_path, "text-generation"), batch_size=size) for size in (1, 8)]
    pair = [list(read(state).batches("train", 5, seed=1)) for state in made]
    folders = {state.facts["predictions"]["folder"] for state in made}
    assert len(folders) == 1, "the batch size changes nothing that is stored"
    both = [torch.cat([one[f"{taught.MARK}ids"].flatten() for one in batches]) for batches in pair]
    assert torch.equal(*both)
    other = teach(make_state(tmp_path, "text-generation"), seed=1)
    assert other.facts["predictions"]["folder"] not in folders


def test_a_killed_pass_goes_on_with_the_shards_that_are_missing(tmp_path, monkeypatch, small_shards):
    straight = teach(make_state(tmp_path, "text-generation"), states=[-1])
    written = {path.name: path.read_bytes() for path in folder_of(straight).iterdir()}
    (again := tmp_path / "again").mkdir()
    whole, calls = lesson.Lesson.look, []

    def failing(self, split, numbers):
        calls.append(split)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(self, split, numbers)

    monkeypatch.setattr(lesson.Lesson, "look", failing)
    with pytest.raises(KeyboardInterrupt):
        teach(make_state(again, "text-generation"), states=[-1])
    resumed = teach(make_state(again, "text-generation"), states=[-1])
    assert 0 < resumed.figures["shards_written"] < resumed.figures["shards"] == straight.figures["shards"]
    assert {path.name: path.read_bytes() for path in folder_of(resumed).iterdir()} == written
    assert teach(make_state(again, "text-generation"), states=[-1]).figures["shards_written"] == 0


def folder_of(state):
    return state.workshop.run / (state.facts.get("predictions") or state.facts["states"])["folder"]


def test_storage_is_a_small_part_of_all_logits(tmp_path):
    state = teach(make_state(tmp_path, "text-generation", vocab_size=5000), samples=16)
    assert 0 < state.figures["bytes"] < 0.02 * 2 * 5000 * state.figures["tokens"]


# Recovery.


def without_teacher(state, folder):
    """The state with its dense model on disk, where nobody may load it."""
    state.dense.model.save_pretrained(folder)

    class Absent(Teacher):
        @property
        def model(self):
            raise AssertionError("the teacher was loaded")

    state.dense = Absent(str(folder), state.task)
    return state


@pytest.mark.parametrize(
    ("task", "losses"),
    [
        ("text-generation", {"logits": 1, "hidden": 1}),
        ("text-generation", {"skew": 1, "task": 0.1, "cosine": {"last": 1}}),
        ("token-classification", {"jsd": 1, "hidden": 1}),
        ("text-classification", {"reverse": 1, "margins": 1, "similarity": 1}),
        ("feature-extraction", {"embedding": 1, "tokens": 1, "graph": 1}),
    ],
)
def test_a_recovery_needs_no_teacher_any_more(tmp_path, task, losses, small_shards):
    samples = {"samples": 0} if task == "feature-extraction" else {"samples": 24}
    state = teach(make_state(tmp_path, task), states=[0, 1, 2], **samples)
    prune(state)
    after = distill(without_teacher(state, tmp_path / "dense"), losses=losses, cached=True)
    assert after.figures["loss_after"] < 0.9 * after.figures["loss_before"]
    assert set(after.figures["history"][-1]) >= {"step", "loss", "validation", *losses}


def test_by_many_draws_the_loss_is_that_by_the_teacher_itself(tmp_path):
    state = teach(make_state(tmp_path, "text-generation", vocab_size=300), samples=256, states=[0, 1, 2])
    prune(state)
    losses = Losses(logits=1, skew=1, hidden=1)
    online, stored = Comparison(losses, state), Comparison(losses, state, taught=read(state))
    assert stored.teacher is None
    for batch in read(state).batches("train", 32, seed=0):
        both = [compare.losses(compare.student, batch) for compare in (online, stored)]
        torch.testing.assert_close(*both, rtol=0.03, atol=0)


def test_a_killed_recovery_by_the_store_resumes_to_the_same_bits(tmp_path):
    def ready(name):
        (folder := tmp_path / name).mkdir(exist_ok=True)
        state = teach(make_state(folder, "text-generation"))
        prune(state)
        return state

    options = {"losses": {"logits": 1}, "cached": True, "checkpoint_every": 4}
    straight = distill(ready("straight"), **options)
    with power_cut(Comparison, "losses", 20):
        distill(ready("killed"), **options)
    resumed = distill(ready("killed"), **options)
    assert straight.figures["history"] == resumed.figures["history"]


def test_dropped_blocks_find_what_they_were_among_the_stored(tmp_path):
    state = teach(make_state(tmp_path, "text-generation"), states=[0, 2])
    (stack,) = state.layout.stacks
    state.layout = state.layout.drop(state.model, stack, [0, 2])
    batch = next(iter(read(state).batches("train", 8, seed=0)))
    both = [Comparison(Losses(hidden=1), state, taught=one) for one in (None, read(state))]
    torch.testing.assert_close(
        *(compare.losses(compare.student, batch)["hidden"] for compare in both), rtol=1e-2, atol=0
    )


# What can't be.


@pytest.mark.parametrize(
    ("options", "losses", "told"),
    [
        ({}, {"reverse": 1}, r"'reverse' needs all of a prediction.*expected one of logits, skew"),
        ({}, {"logits": {"keep": 0.5}}, "'logits' needs all of a prediction"),
        ({}, {"logits": {"temperature": 2}}, "temperature 2, and what is stored was drawn at 1; expected the same"),
        ({"states": [0]}, {"hidden": {"last": 2}}, r"after blocks \[1, 2\]; stored are \[0\]"),
        ({"states": [-1]}, {"graph": 1}, r"after blocks \[0, 1, 2\]; stored are \[2\]"),
    ],
)
def test_a_loss_that_asks_for_more_is_refused_before_training(tmp_path, options, losses, told):
    state = teach(make_state(tmp_path, "text-generation"), **options)
    with pytest.raises(TrainingError, match=told):
        Comparison(Losses(**losses), state, taught=read(state))


def test_what_can_not_be_stored_is_told(tmp_path):
    state = make_state(tmp_path, "text-generation")
    with pytest.raises(TrainingError, match=r"no block 3; expected one of -3\.\.2"):
        teach(state, states=[3])
    with torch.no_grad():
        state.dense.model.model.layers[0].mlp.down_proj.weight.mul_(1e7)
    with pytest.raises(TrainingError, match="float16 can't hold; expected precision: bfloat16"):
        teach(state, states=[0], samples=0)
    assert teach(state, states=[0], samples=0, precision="bfloat16").figures["bytes"] > 0
    with pytest.raises(TrainingError, match="fill-mask draws masks anew"):
        teach(make_state(tmp_path, "fill-mask"))
    with pytest.raises(TrainingError, match="no classes to predict; expected samples: 0"):
        teach(make_state(tmp_path, "feature-extraction"))
    with pytest.raises(ValueError, match="nothing is stored"):
        Teach(samples=0)


def test_texts_that_change_are_told(tmp_path):
    state = teach(make_state(tmp_path, "text-generation"))
    fact = state.facts["predictions"]
    with pytest.raises(TrainingError, match="of other texts or gone"):
        Taught([fact], state.workshop.run, replace(state.data, fingerprint="another"))
    with pytest.raises(TrainingError, match="of other texts or gone"):
        Taught([fact], tmp_path / "elsewhere", state.data)
    with pytest.raises(TrainingError, match="two steps stored"):
        Taught([fact, {**fact, "folder": "another"}], state.workshop.run, state.data)
    swapped = state.data.options.model_copy(update={"substitute": 0.3})
    state.data = Data.open(swapped, state.tokenizer, state.task)
    with pytest.raises(TrainingError, match=r"data\.substitute swaps words anew"):
        teach(state)


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ([{"distill": {"cached": True, "losses": {"logits": 1}}}], r"needs 'predictions' .*stored by teach"),
        (["teach", {"distill": {"cached": True, "losses": {"hidden": 1}}}], r"needs 'states' .*by teach with `states`"),
        (["teach", "finetune", {"distill": {"cached": True, "losses": {"logits": 1}}}], "finetune has made stale"),
        (["teach", "vocabulary", {"distill": {"cached": True, "losses": {"logits": 1}}}], "vocabulary has made stale"),
        (["teach", {"distill": {"cached": True, "losses": {"attention": 1}}}], "'attention' reads attention"),
        (["teach", {"distill": {"cached": True}}], "no loss that asks the teacher"),
        (["teach", {"distill": {"cached": True, "losses": {"logits": 1}, "teachers": ["dense"]}}], "no teachers"),
        (["teach", {"distill": {"cached": True, "losses": {"task": 1}}}], "no loss that asks the teacher"),
    ],
)  # fmt: skip
def test_a_plan_is_told_what_is_not_stored(tmp_path, passes, told):
    make_world(tmp_path)
    try:  # wrong options are told when they are read, wrong orders when the plan is checked
        said = "\n".join(map(str, plan_of(tmp_path, passes).check()))
    except PlanError as error:
        said = str(error)
    assert re.search(told, said), said


def plan_of(folder, passes) -> Plan:
    values = {"model": str(folder / "my-encoder"), "data": {"source": str(folder / "reviews.txt"), "max_length": 16}}
    return Plan.read({**values, "passes": passes, "export": []}, Tables(PASSES, EXPORTERS))


def test_a_run_teaches_once_and_forgets_the_teacher(tmp_path):
    make_world(tmp_path)
    recover = {"distill": {"cached": True, "losses": {"embedding": 1}, "steps": 2}}
    passes = [{"teach": {"samples": 0, "states": [-1]}}, {"drop_blocks": {"remove": 1, "keep_first": 0}}, recover]
    plan = plan_of(tmp_path, passes)
    assert plan.check() == []
    run = Run(plan, prepare(tmp_path / "out", fresh=False))
    (node,) = run.go()
    state = run.state(node)
    assert set(state.facts) == {"states"}
    assert json.loads(json.dumps(state.facts["states"])) == state.facts["states"]
    assert "model" not in vars(state.dense)
    assert len(list((tmp_path / "out" / ".cache" / "taught").iterdir())) == 1
