"""The training loop: a killed run ends in the same bits as one that was not, and says when a loss is no number."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from compress.errors import TrainingError
from compress.recipe import TrainingOptions
from compress.training import CHECKPOINT, Beside, train

STEPS, ROWS, SIZE = 12, 22, 4  # 6 batches an epoch, the last of 2 rows, so checkpoints fall inside epochs
ROOT = Path(__file__).parents[1]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))


def rows(epoch: int):
    generator = torch.Generator().manual_seed(100 + epoch)
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(7))
    for picked in torch.randperm(ROWS, generator=generator).split(SIZE):
        yield {"x": x[picked], "y": x[picked].sum(1, keepdim=True)}


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


class Trap:
    """A loss that does something at its n-th call."""

    def __init__(self, call: int, spring) -> None:
        self.call, self.spring, self.calls = call, spring, 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.call:
            self.spring()
        return squared(model, batch)


def fail(error: BaseException):
    raise error


def run(folder: Path, loss=squared, model=None, validated: bool = True, batches=rows, **options):
    given = {"learning_rate": 0.05, "checkpoint_every": 1, "validate_every": 3, "precision": "float32", **options}
    model = network() if model is None else model
    recipe = TrainingOptions(**given)
    probe = next(iter(rows(0)))
    validate = partial(lambda: float(squared(model, probe))) if validated else None
    result = train(model, batches, loss, recipe, folder=folder, total_steps=STEPS, validate=validate)
    return model.state_dict(), result


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def told(result) -> tuple:
    return result.history, result.best_step, result.best_score, result.steps


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("call", [2, 8, 11])
@pytest.mark.parametrize("validated", [True, False])
def test_resumed_run_ends_in_the_same_bits(tmp_path, accumulate, every, call, validated):
    options = {"accumulate": accumulate, "checkpoint_every": every, "validated": validated}
    straight, result = run(tmp_path / "straight", **options)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "killed", Trap(call, partial(fail, RuntimeError("power cut"))), **options)
    counted = Trap(0, None)
    resumed, again = run(tmp_path / "killed", counted, **options)
    assert same(straight, resumed)
    assert told(result) == told(again)
    done = (call - 1) // accumulate // every * every  # the steps that the last checkpoint holds
    assert counted.calls == (STEPS - done) * accumulate


def test_run_killed_by_the_system_ends_in_the_same_bits(tmp_path):
    script = (
        "import os, signal, sys; from functools import partial; from pathlib import Path;"
        "from tests.test_training import Trap, run;"
        "run(Path(sys.argv[1]), Trap(9, partial(os.kill, os.getpid(), signal.SIGKILL)), checkpoint_every=2)"
    )
    # Sums over another number of threads have other bits, and tests before this one may have set it.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    words = [sys.executable, "-c", script, str(tmp_path / "killed")]
    killed = subprocess.run(words, cwd=ROOT, env={**os.environ, **threads}, check=False)
    assert killed.returncode == -signal.SIGKILL
    straight, result = run(tmp_path / "straight", checkpoint_every=2)
    counted = Trap(0, None)
    resumed, again = run(tmp_path / "killed", counted, checkpoint_every=2)
    assert counted.calls == STEPS - 8
    assert same(straight, resumed)
    assert told(result) == told(again)


def test_interrupt_leaves_a_checkpoint_of_the_last_whole_step(tmp_path):
    options = {"checkpoint_every": 1000, "accumulate": 2}
    straight, _ = run(tmp_path / "straight", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Trap(10, partial(fail, KeyboardInterrupt())), **options)
    counted = Trap(0, None)
    resumed, _ = run(tmp_path / "stopped", counted, **options)
    assert same(straight, resumed)
    assert counted.calls == (STEPS - 4) * 2


def test_a_half_written_checkpoint_is_never_read(tmp_path):
    straight, _ = run(tmp_path / "straight", checkpoint_every=4)
    with pytest.raises(RuntimeError):
        run(tmp_path / "killed", Trap(7, partial(fail, RuntimeError())), checkpoint_every=4)
    (tmp_path / "killed" / CHECKPOINT).with_suffix(".unfinished").write_bytes(b"half")
    assert same(straight, run(tmp_path / "killed", checkpoint_every=4)[0])


def test_checkpoint_is_safetensors_with_a_json_position(tmp_path):
    run(tmp_path)
    names = set(load_file(tmp_path / CHECKPOINT))
    assert {"weights.model.0.weight", "best.model.0.weight", "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq"} <= names
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == STEPS
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(TrainingError, match="another run"):
        run(tmp_path, learning_rate=0.01)
    save_file({"weights.model.0.weight": torch.zeros(1)}, tmp_path / CHECKPOINT)
    with pytest.raises(TrainingError, match="another run"):
        run(tmp_path)


def test_accumulation_equals_one_large_batch(tmp_path):
    def halves(epoch):
        for batch in rows(epoch):
            if len(batch["x"]) == SIZE:
                yield from ({name: part[half] for name, part in batch.items()} for half in (slice(0, 2), slice(2, 4)))

    def whole(epoch):
        return (batch for batch in rows(epoch) if len(batch["x"]) == SIZE)

    one, _ = run(tmp_path / "one", batches=whole, dropout=False, validated=False)
    two, _ = run(tmp_path / "two", batches=halves, accumulate=2, dropout=False, validated=False)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_training_learns_and_ends_with_the_best_weights(tmp_path):
    model = network().eval()
    _, result = run(tmp_path, model=model, validate_every=1, dropout=False)
    scores = {row["step"]: row["validation"] for row in result.history}
    assert list(scores) == list(range(STEPS + 1))
    assert result.best_score == min(scores.values()) == scores[result.best_step] < scores[0]
    with torch.no_grad():
        assert float(squared(model, next(iter(rows(0))))) == pytest.approx(result.best_score, rel=1e-6)


def test_training_that_only_harms_gives_the_model_back(tmp_path):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = iter(range(100))
    recipe = TrainingOptions(learning_rate=0.1, validate_every=2, patience=3, precision="float32")
    result = train(model, rows, squared, recipe, folder=tmp_path, total_steps=50, validate=lambda: float(next(scores)))
    assert same(before, model.state_dict())
    assert (result.best_step, result.best_score, result.steps) == (0, 0.0, 6)


@pytest.mark.parametrize("validated", [True, False])
def test_the_average_of_the_weights_is_kept_and_resumed(tmp_path, validated):
    seen, decay, model = [], 0.7, network()

    def watched(model, batch):
        seen.append([one.detach().clone() for one in model.parameters()])
        return squared(model, batch)

    options = {"average": decay, "validate_every": STEPS, "validated": validated}
    straight, result = run(tmp_path / "straight", watched, model, **options)
    last, _ = run(tmp_path / "last", validated=False)
    mean, after = seen[0], [*seen[1:], list(last.values())]
    for step, weights in enumerate(after, 1):
        stays = min(decay, (1 + step) / (10 + step))
        mean = [stays * one + (1 - stays) * other for one, other in zip(mean, weights, strict=True)]
    for one, other in zip(straight.values(), mean, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "killed", Trap(8, partial(fail, RuntimeError("power cut"))), **options)
    resumed, again = run(tmp_path / "killed", **options)
    assert same(straight, resumed)
    assert told(result) == told(again)


def test_what_is_beside_the_model_is_trained_resumed_and_told_how_far_the_run_is(tmp_path):
    def go(folder, call=0):
        model, beside, shares = network(), Beside({"map": nn.Linear(1, 1, bias=False)}), []
        nn.init.ones_(beside["map"].weight)
        trap = Trap(call, partial(fail, RuntimeError("power cut")))

        def loss(model, batch):
            shares.append(beside.share)
            trap(model, batch)
            return (beside["map"](model(batch["x"])) - batch["y"]).square().mean()

        recipe = TrainingOptions(learning_rate=0.05, checkpoint_every=5, precision="float32")
        train(model, rows, loss, recipe, folder=folder, total_steps=STEPS, beside=beside)
        return model.state_dict() | beside.state_dict(), shares

    straight, shares = go(tmp_path / "straight")
    assert straight["map.weight"].item() != 1
    assert shares == [(step + 0.5) / STEPS for step in range(STEPS)]
    with pytest.raises(RuntimeError, match="power cut"):
        go(tmp_path / "killed", 8)
    resumed, rest = go(tmp_path / "killed")
    assert same(straight, resumed)
    assert rest == shares[5:]


def test_a_model_without_blocks_has_nothing_to_recompute(tmp_path):
    with pytest.raises(TrainingError, match="Sequential has no blocks to compute anew; expected recompute: false"):
        run(tmp_path, recompute=True)


def test_the_best_weights_survive_a_kill(tmp_path):
    def go(folder, loss, scores):
        model, given = network(), iter(scores)
        recipe = TrainingOptions(learning_rate=0.05, checkpoint_every=1, validate_every=3, precision="float32")
        train(model, rows, loss, recipe, folder=folder, total_steps=STEPS, validate=lambda: float(next(given)))
        return model.state_dict()

    straight = go(tmp_path / "straight", squared, [5, 1, 6, 7, 8])
    with pytest.raises(RuntimeError):
        go(tmp_path / "killed", Trap(8, partial(fail, RuntimeError())), [5, 1, 6])
    assert same(straight, go(tmp_path / "killed", squared, [7, 8]))


def test_named_losses_are_summed_and_told_apart(tmp_path):
    def halves(model, batch):
        return {"near": 0.25 * squared(model, batch), "far": 0.75 * squared(model, batch)}

    straight, result = run(tmp_path / "one", dropout=False)
    parted, told_apart = run(tmp_path / "two", halves, dropout=False)
    for name in straight:
        torch.testing.assert_close(straight[name], parted[name], rtol=1e-4, atol=1e-5)
    row = told_apart.history[-1]
    assert row["near"] + row["far"] == pytest.approx(row["loss"]) == pytest.approx(result.history[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told(tmp_path, value):
    calls = iter(range(100))
    with pytest.raises(TrainingError, match=rf"loss is {value} at step 4 .*last good loss \d.*lower learning_rate"):
        run(tmp_path, lambda model, batch: squared(model, batch) * (value if next(calls) == 3 else 1))


def test_what_can_not_be_trained_is_told(tmp_path):
    with pytest.raises(TrainingError, match="no parameter"):
        run(tmp_path, model=network().requires_grad_(False))
    with pytest.raises(TrainingError, match="no batch"):
        run(tmp_path, batches=lambda epoch: iter(()))


def test_the_model_and_the_random_state_come_back_as_they_were(tmp_path):
    model = network().eval()
    model[4].bias.requires_grad_(False)
    frozen = model[4].bias.clone()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run(tmp_path, model=model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[4].bias, frozen)
    run(tmp_path / "again", model=model, learning_rate=0.01)


def test_vectors_are_not_decayed(tmp_path):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after, _ = run(tmp_path, lambda model, batch: 0 * squared(model, batch), model, validated=False, weight_decay=0.5)
    for name, tensor in after.items():
        assert (tensor.norm() < 0.9 * before[name].norm()) if tensor.ndim == 2 else torch.equal(tensor, before[name])


def test_without_dropout_the_loss_is_that_of_evaluation_mode(tmp_path):
    modes = []
    for dropout in (True, False):
        run(
            tmp_path / str(dropout),
            lambda model, batch: modes.append(model.training) or squared(model, batch),
            dropout=dropout,
        )
    assert modes == [True] * STEPS + [False] * STEPS


def test_bfloat16_runs_the_forward_pass_in_bfloat16_and_keeps_float32_weights(tmp_path):
    seen = []

    def loss(model, batch):
        output = model(batch["x"])
        seen.append(output.dtype)
        return (output.float() - batch["y"]).square().mean()

    weights, _ = run(tmp_path, loss, precision="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_minutes_end_a_run_and_it_still_validates_last(tmp_path):
    model = network()
    recipe = TrainingOptions(minutes=0.01, precision="float32")
    assert recipe.total_steps(1000) is None
    probe = next(iter(rows(0)))
    result = train(
        model, rows, squared, recipe, folder=tmp_path, total_steps=None, validate=lambda: float(squared(model, probe))
    )
    assert 0.5 < result.seconds < 10
    assert result.steps > 1
    assert result.history[-1]["step"] == result.steps


def test_learning_rate_rises_then_falls_to_nothing():
    recipe = TrainingOptions(learning_rate=1.0, warmup=0.2)
    rates = [recipe.rate(share / 100) for share in range(101)]
    assert rates[0] == 0
    assert rates[20] == max(rates) == 1
    assert rates[100] == pytest.approx(0)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert TrainingOptions(learning_rate=1.0, warmup=0).rate(0) == 1


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"steps": 7}, 7), ({"epochs": 2.0}, 63), ({"epochs": 0.01}, 1), ({}, 94), ({"epochs": 2.0, "accumulate": 4}, 16)],
)
def test_bounds_in_steps(options, steps):
    assert TrainingOptions(**options).total_steps(1000) == steps


def test_two_bounds_of_a_kind_are_refused():
    with pytest.raises(ValueError, match="both steps and epochs"):
        TrainingOptions(steps=3, epochs=1.0)
