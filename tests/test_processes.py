"""Several processes of one run: they give what one gives, and the main one alone writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress import compress
from compress.contract import MASKS
from compress.errors import TrainingError
from compress.masks import zeros
from compress.training import CHECKPOINT
from passes.distillation.compare import Comparison
from passes.pruning.sparse.sparsify import Sparsify
from tests.test_distill import distill, make_state, prune
from tests.world import make_world

ROOT = Path(__file__).parents[1]
# A weight moves by a hundredth in a run. Where its gradient is nothing but rounding, as that of a bias of keys, Adam
# takes whole steps along with it.
ROUNDING = 1e-3
LOSSES = {"hidden": {"project": True}, "logits": 1.0, "task": 0.5}
PLAN = {
    "model": "my-encoder",
    "task": "text-classification",
    "data": {"source": "reviews.tsv", "text": "sentence", "label": "label", "train_rows": 64, "test_rows": 40},
    "target": {"runtime": "torch", "sequence": 16},
    "passes": [
        {"finetune": {"steps": 4, "batch_size": 8, "accumulate": 2, "precision": "float32", "shard": True}},
        {"drop_blocks": {"remove": 1, "samples": 8, "keep_first": 0}},
        {"distill": {"steps": 4, "batch_size": 8, "accumulate": 2, "precision": "float32"}},
    ],
    "export": ["huggingface"],
    "out": "out",
}


def recover(folder: Path, **more: Any) -> None:
    """Distil a pruned, sparse model with all that a step may have: dropout, learned maps, an average; write it down."""
    state = make_state(folder, "text-classification", attention_probs_dropout_prob=0.2)
    prune(state)
    (state,) = Sparsify(method="magnitude", sparsity=0.3).run(state)
    options = {"steps": 8, "batch_size": 6, "accumulate": 4, "dropout": True, "average": 0.5, "losses": LOSSES}
    after = distill(state, checkpoint_every=4, **options, **more)
    assert zeros(after.model, after.facts[MASKS.name])["filled"] == {}
    rank = PartialState().process_index
    save_file(after.model.state_dict(), folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(after.figures))


def run_plan(folder: Path) -> None:
    os.chdir(folder)
    compress(plan=PLAN)


def recover_in_shares(folder: Path) -> None:
    recover(folder, shard=True)


def stop_in_shares(folder: Path) -> None:
    """As before, but killed in the sixth step, after the checkpoint of the fourth."""
    whole, calls = Comparison.losses, iter(range(1000))

    def failing(self, student, batch):
        if student.training and next(calls) == 10:
            os._exit(0)
        return whole(self, student, batch)

    Comparison.losses = failing
    recover(folder, shard=True)


JOBS = {"recover": recover, "shares": recover_in_shares, "stop": stop_in_shares, "plan": run_plan}


def launch(job: str, folder: Path, processes: int = 2) -> None:
    """Run a job in so many processes."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += ["-m", "tests.test_processes", job, str(folder)]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("job", ["recover", "shares"])
def test_two_processes_give_the_curve_and_the_weights_of_one(tmp_path, job):
    one, two = made(tmp_path / "one"), made(tmp_path / "two")
    recover(one)
    launch(job, two)
    weights = [load_file(path) for path in (one / "0.safetensors", two / "0.safetensors", two / "1.safetensors")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=ROUNDING)
        assert torch.equal(weights[1][name], weights[2][name])
    histories = [json.loads((folder / "0.json").read_text())["history"] for folder in (one, two)]
    assert len(histories[0]) == len(histories[1]) > 5
    for mine, theirs in zip(*histories, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    # One process goes on from what two wrote, which is all that one would have written.
    found, expected = (load_file(folder / "step" / CHECKPOINT) for folder in (two, one))
    assert found.keys() == expected.keys()
    assert all(found[name].shape == tensor.shape for name, tensor in expected.items())


def test_one_process_goes_on_from_what_two_with_shares_left(tmp_path):
    one, two = made(tmp_path / "one"), made(tmp_path / "two")
    recover(one)
    launch("stop", two)
    with safe_open(two / "step" / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 4
    recover(two, shard=True)
    weights = [load_file(folder / "0.safetensors") for folder in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=ROUNDING)


def test_a_plan_in_two_processes_is_run_once(tmp_path):
    make_world(tmp_path)
    launch("plan", tmp_path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (branch,) = report["branches"]
    assert [step["pass"] for step in branch["steps"]] == ["finetune", "drop_blocks", "distill"]
    nodes = list((tmp_path / "out" / ".cache" / "nodes").iterdir())
    assert len(nodes) == 3
    assert not list((tmp_path / "out").rglob("*.unfinished"))


def test_batches_that_processes_cannot_share_alike_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    state = make_state(tmp_path, "text-classification")
    with pytest.raises(TrainingError, match="2 processes can't share alike the 3 batches of an update; expected acc"):
        distill(state, accumulate=3)


if __name__ == "__main__":
    JOBS[sys.argv[1]](Path(sys.argv[2]))
