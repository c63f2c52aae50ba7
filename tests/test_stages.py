"""Stages of a recovery: each step has its teacher, one or several, and its texts."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from compress import compress
from compress.errors import TrainingError
from compress.plan import Plan, Tables
from compress.runner import Run
from compress.state import State
from exporters import EXPORTERS
from passes import PASSES
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.distillation.distill import Distill
from passes.distillation.pairs import places
from passes.distillation.teachers import Ensemble, mean, shift, taught_by
from tests.test_distill import distill, make_state, prune
from tests.world import make_world

ROOT = Path(__file__).parents[1]


def stranger(state: State) -> State:
    """A state whose model predicts otherwise."""
    other = state.branch()
    other.model = copy.deepcopy(state.model)
    with torch.no_grad():
        other.model.classifier.weight.neg_()
    return other


def distance(state: State, teacher: torch.nn.Module) -> float:
    """How far the state's predictions of the validation split are from a model's."""
    held, state.dense = state.dense, copy.copy(state.dense)
    vars(state.dense)["model"] = teacher
    with torch.no_grad():
        state.model.eval()
        found = Comparison(Losses(logits=1.0), state).mean(state.data.batches("validation", 16))
    state.dense = held
    return found


def test_a_step_that_follows_two_teaches_the_first_by_the_second(tmp_path):
    state = make_state(tmp_path, "text-classification")
    other, dense = stranger(state), state.dense
    prune(state)
    kept = dict(state.kept)
    state.others = (other,)
    after = distill(state, losses={"logits": 1.0})
    assert distance(after, other.model) < 0.5 * distance(after, dense.model)
    assert after.kept == kept
    assert after.dense is other.dense is dense
    assert not any(parameter.requires_grad for parameter in other.model.parameters())


def test_a_teacher_from_a_folder_is_the_same_and_so_is_the_dense_one_by_its_name(tmp_path):
    found = []
    for name in ("follows", "folder"):
        (tmp_path / name).mkdir()
        state = make_state(tmp_path / name, "text-classification")
        other = stranger(state)
        prune(state)
        other.model.save_pretrained(tmp_path / "other")
        other.tokenizer.save_pretrained(tmp_path / "other")
        state.others = (other,) if name == "follows" else ()
        teachers = () if name == "follows" else (str(tmp_path / "other"),)
        found.append(distill(state, steps=4, losses={"logits": 1.0}, teachers=teachers).model.state_dict())
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    with taught_by(state, ("dense",)):
        assert state.dense.model is state.teacher
        assert state.kept == {}
    assert Distill(teachers=("dense", "some/model"), data={"source": "builtin"}).sources == ("some/model", "builtin")


def test_the_fine_tuned_teacher_becomes_the_dense_model(tmp_path):
    state = make_state(tmp_path, "text-classification")
    tuned = stranger(state)
    tuned.becomes_dense()
    prune(state)
    state.others = (tuned,)
    assert distill(state, steps=1).dense is tuned.dense


def test_several_teachers_predict_the_mean_of_their_predictions(tmp_path):
    one, other = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    half = (one.softmax(-1) + other.softmax(-1)) / 2
    torch.testing.assert_close(mean([one, other]).softmax(-1), half)
    torch.testing.assert_close(mean([one, one, one]).softmax(-1), one.softmax(-1))
    sure = torch.tensor([[30.0, 0, 0, 0]])
    weighed = mean([sure, torch.zeros(1, 4)], surest=True).softmax(-1)
    assert float(weighed[0, 0]) == pytest.approx(0.8 + 0.2 * 0.25, rel=1e-4)  # entropies 0 and log 4: 4 to 1
    torch.testing.assert_close(mean([one[:, :1], other[:, :1]]), (one[:, :1] + other[:, :1]) / 2)
    state = make_state(tmp_path, "text-classification")
    batch = next(iter(state.data.batches("train", 4)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    both = [state.dense.model, stranger(state).model.eval()]
    with torch.no_grad():
        each, all_of_them = [model(**inputs).logits for model in both], Ensemble(both, mean)(**inputs).logits
    torch.testing.assert_close(all_of_them, mean(each))


def test_several_teachers_teach_by_predictions_alone(tmp_path):
    state = make_state(tmp_path, "text-classification")
    prune(state)
    before = state.branch()
    before.others = state.others = (stranger(state),)
    after = distill(state, losses={"logits": 1.0}, teachers=("dense",), combine="surest")
    assert after.figures["loss_after"] < after.figures["loss_before"]
    with pytest.raises(TrainingError, match="loss 'hidden' looks into one teacher, and there are several"):
        distill(before, teachers=("dense",))
    with pytest.raises(TrainingError, match="1 teachers to combine by surest; expected several"):
        distill(before, combine="surest")
    with pytest.raises(TrainingError, match="1 teachers to combine by shift; expected two"):
        distill(before, combine="shift")


def test_a_student_shifts_as_its_teacher_has(tmp_path):
    after, before, base = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shift([after, before, base]) - base, after - before)
    torch.testing.assert_close(shift([after, before, before]), after)
    state = make_state(tmp_path, "text-classification")
    prune(state)
    state.others = (stranger(state), stranger(state))  # that has not changed
    still = distill(state, losses={"logits": 1.0}, combine="shift", steps=2)
    assert still.figures["loss_before"] == pytest.approx(0, abs=1e-6)
    first, second = stranger(state), stranger(state)
    with torch.no_grad():
        first.model.classifier.bias.add_(torch.tensor([2.0, 0.0]))
    state.others = (first, second)
    batch = next(iter(state.data.batches("validation", 8)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        started = state.model.eval()(**inputs).logits
    distill(state, losses={"logits": 1.0}, combine="shift")
    with torch.no_grad():
        moved = state.model.eval()(**inputs).logits
    gained = (moved - started)[:, 0] - (moved - started)[:, 1]
    assert gained.mean() == pytest.approx(2, abs=0.5)


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    state = make_state(tmp_path, "text-classification")
    other = stranger(state)
    other.tokenizer = copy.deepcopy(other.tokenizer)
    other.tokenizer.add_tokens(["newword"])
    state.others = (other,)
    with pytest.raises(TrainingError, match="reads other tokens, 46 of them and 45 here"):
        distill(state)


def test_blocks_of_a_stranger_are_spread_evenly(tmp_path):
    state = make_state(tmp_path, "text-classification", num_hidden_layers=4)
    assert places(state, 4, 4) == [0, 1, 2, 3]
    state.drop("bert.encoder.layer", [0, 2])
    assert places(state, 2, 4) == [0, 3]  # the last are compared whatever they were
    (tmp_path / "deep").mkdir()
    deep = make_state(tmp_path / "deep", "text-classification", num_hidden_layers=8)
    deep.model.save_pretrained(tmp_path / "teacher")
    deep.tokenizer.save_pretrained(tmp_path / "teacher")
    with taught_by(state, (str(tmp_path / "teacher"),)):
        assert [places(state, 2, 8), places(state, 4, 8), places(state, 6, 3)] == [
            [3, 7], [1, 3, 5, 7], [0, 0, 1, 1, 2, 2],
        ]  # fmt: skip
    assert distill(state, steps=1, teachers=(str(tmp_path / "teacher"),), losses={"hidden": 1.0}).figures["loss_before"]


def test_a_stage_learns_from_texts_of_its_own(tmp_path):
    (tmp_path / "own.txt").write_text("\n".join(f"word{number} word{number + 1}" for number in range(30)))
    state = make_state(tmp_path, "text-classification")
    prune(state)
    data, seen = state.data, []
    whole = Comparison.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Comparison, "losses", lambda self, student, batch: seen.append(batch) or whole(self, student, batch)
        )
        own = {"source": str(tmp_path / "own.txt"), "max_length": 16}
        after = distill(state, steps=2, data=own, losses={"hidden": 1.0})
    assert after.data is data
    assert seen
    assert all("labels" not in batch and set(batch["attention_mask"].sum(1).tolist()) == {4} for batch in seen)


def test_the_texts_of_a_stage_are_looked_for_before_a_weight_is_loaded(tmp_path):
    make_world(tmp_path)
    passes = [{"distill": {"data": {"source": "nowhere.txt"}}}]
    plan = Plan.read({"model": str(tmp_path / "my-encoder"), "passes": passes}, Tables(PASSES, EXPORTERS))
    (problem,) = plan.check()
    assert "passes[0].distill.data" in problem
    assert "nowhere.txt does not exist" in problem


@pytest.mark.parametrize("name", ["stages", "corrected"])
def test_the_shipped_stages_run(tmp_path, monkeypatch, name):
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    data = {"source": "reviews.tsv", "text": "sentence", "label": "label", "train_rows": 60, "test_rows": 40}
    encoder = {"model": "my-encoder", "task": "text-classification", "data": data, "export": []}
    plan |= {**encoder, "target": {"runtime": "torch", "sequence": 16}}
    for step in plan["passes"]:
        for kind in ("finetune", "distill"):
            if kind in step:
                bounds = {key: value for key, value in step[kind].items() if key not in ("epochs", "steps")}
                step[kind] = {**bounds, "steps": 2, "batch_size": 8}
        step.update({"drop_blocks": {"remove": 1, "keep_first": 0, "samples": 8}} if "drop_blocks" in step else {})
        small = {"columns": 512, "recovery_steps": 0, "samples": 8}
        step.update({"minitron": small} if "minitron" in step else {})
    report = compress(plan=plan, out=tmp_path / "out").report
    (branch,) = report["branches"]
    assert [step["pass"] for step in branch["steps"]][-1] == "distill"
    assert branch["parameters"] < report["baseline"]["parameters"]
    nodes = (tmp_path / "out" / ".cache" / "nodes").iterdir()
    tuned = [node for node in nodes if '"pass": "finetune"' in (node / "state.json").read_text()]
    assert len(tuned) == 1
    last = [node for node in tuned[0].parent.iterdir() if f"{tuned[0].name}/model" in (node / "state.json").read_text()]
    assert len(last) >= 2  # those that learnt from the fine-tuned model have it for the dense one


def test_what_a_stage_reads_beside_the_plan_is_part_of_its_key(tmp_path):
    make_world(tmp_path)
    own, teacher = tmp_path / "own.txt", tmp_path / "teacher"
    own.write_text("the film is fine\n")
    shutil.copytree(tmp_path / "my-encoder", teacher)
    options = {"data": {"source": str(own)}, "teachers": ["dense", str(teacher)]}
    texts = {"source": str(tmp_path / "reviews.txt")}
    plan = {"model": str(tmp_path / "my-encoder"), "data": texts, "passes": [{"distill": options}]}
    run = Run(Plan.read(plan, Tables(PASSES, EXPORTERS)), tmp_path / "cache")
    (node,) = run.plan.nodes()
    keys = [run.key(node)]
    own.write_text("the film is dull\n")
    keys.append(run.key(node))
    (teacher / "config.json").write_text((teacher / "config.json").read_text() + " ")
    keys.append(run.key(node))
    assert len(set(keys)) == 3
    assert run.key(node) == keys[-1]
