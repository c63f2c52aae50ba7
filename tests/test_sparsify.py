"""Sparse models of every family: zeros where masks say so, kept by all training, through saving, loading and export."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress import checkpoint, compress
from compress.contract import MASKS, stale_after
from compress.data.calibration import calibration
from compress.errors import PlanError, TrainingError
from compress.masks import zeros
from compress.plan import Plan, Tables, leaves
from compress.plan.explain import explain
from compress.recipe import TrainingOptions
from compress.runtimes import open_artifact
from compress.target import Target
from compress.training import CHECKPOINT, train
from exporters import EXPORTERS
from exporters.onnx import Onnx
from passes import PASSES
from passes.distillation.finetune import Finetune
from passes.pruning.sparse.gradients import by_outputs
from passes.pruning.sparse.sparsify import METHODS, Sparsify
from tests.conftest import TINY, answer, assert_one_model
from tests.paper import state_of
from tests.test_distill import distill, make_state
from tests.world import make_world

# Every pass that leaves masks, with a way to run it on a labelled text.
WAYS: dict[str, dict] = {"sparsify": {"samples": 16}, "obert": {"gradients": 4, "recomputations": 1}}


def sparse(state, **options):
    (after,) = Sparsify(**{"sparsity": 0.5, "samples": 16, "method": "wanda", **options}).run(state)
    return after


def masked(state) -> dict[str, torch.Tensor]:
    return dict(state.facts[MASKS.name])


def test_every_pass_that_leaves_masks_is_listed() -> None:
    fixed = {name: step.provides for name, step in PASSES.items() if isinstance(step.provides, frozenset)}
    assert {name for name, provided in fixed.items() if MASKS in provided} == set(WAYS)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"runs": {"keep": 2, "of": 4}}, {"sparsity": 0.5, "block": 4}])
def test_every_family_comes_out_sparse_and_loads_as_it_was(name: str, options: dict, tmp_path: Path) -> None:
    tiny = TINY[name]
    state = state_of(tiny, tmp_path)
    before = copy.deepcopy(state.model)
    (after,) = Sparsify(method="sparsegpt", samples=16, **options).run(state)
    masks, run = masked(after), 4 if options != {"sparsity": 0.5} else 1
    layers = dict.fromkeys(name.removesuffix(".weight") for name in masks)
    assert len(layers) + len(after.figures["skipped"]) >= 2 * sum(one.length for one in after.layout.stacks.values())
    told = zeros(after.model, masks)
    assert told["filled"] == {}
    assert abs(told["share"] - 0.5) < 0.02
    for layer in layers:
        module = after.model.get_submodule(layer)
        weight, old = (one.get_submodule(layer).weight for one in (after.model, before))
        assert weight.shape == old.shape
        rows = masks[f"{layer}.weight"].T if isinstance(module, Conv1D) else masks[f"{layer}.weight"]
        if "runs" in options:
            assert (rows.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        if "block" in options:
            assert torch.equal(rows.unflatten(1, (-1, 4)).all(-1), rows.unflatten(1, (-1, 4)).any(-1))
    assert all(f"no multiple of {run}" in reason for reason in after.figures["skipped"].values())
    others = {name: one for name, one in before.named_parameters() if name not in masks}
    assert all(torch.equal(after.model.get_parameter(name), one) for name, one in others.items())
    checkpoint.save(after.model, tmp_path / "saved")
    assert_one_model(type(after.model).from_pretrained(tmp_path / "saved").eval(), after.model, tiny.example())


@pytest.mark.parametrize("method", METHODS)
def test_better_methods_leave_outputs_nearer(method: str, tmp_path: Path) -> None:
    state, plain = (state_of(TINY["llama"], tmp_path / part) for part in ("one", "two"))
    reference = copy.deepcopy(state.model)
    inputs = state.data.tensors
    far = {
        kind: (answer(sparse(one, method=kind, samples=40).model, inputs) - answer(reference, inputs)).square().mean()
        for kind, one in ((method, state), ("magnitude", plain))
    }
    assert far[method] <= far["magnitude"]
    assert (far[method] < 0.9 * far["magnitude"]) == (method != "magnitude")


def test_a_later_step_goes_on_from_an_earlier(tmp_path: Path) -> None:
    state = sparse(state_of(TINY["gpt2"], tmp_path), sparsity=0.3)
    before = masked(state)
    after = sparse(state, sparsity=0.6, method="sparsegpt")
    assert masked(after).keys() == before.keys()
    assert all(not (mask & ~before[name]).any() for name, mask in masked(after).items())
    assert zeros(after.model, masked(after))["share"] == pytest.approx(0.6, abs=0.01)


def test_rates_follow_what_the_loss_can_bear(tmp_path: Path) -> None:
    state = make_state(tmp_path, "text-generation")
    deaf = state.model.get_submodule("model.layers.1.mlp.down_proj")
    with torch.no_grad():
        deaf.weight.zero_()  # so that the loss hears nothing of the matrices before it
    after = sparse(state, rates="allocated", samples=40)
    shares = after.figures["layers"]
    for name in ("gate_proj", "up_proj"):
        assert shares[f"model.layers.1.mlp.{name}.weight"] == pytest.approx(0.95, abs=0.02)
    others = [share for name, share in shares.items() if "layers.1.mlp" not in name]
    assert max(others) - min(others) > 0.09
    assert zeros(after.model, masked(after))["share"] == pytest.approx(0.5, abs=0.01)


def test_what_an_output_is_worth_is_what_the_loss_does_when_it_moves(tmp_path: Path) -> None:
    state = make_state(tmp_path, "text-classification")
    (batch,) = calibration(state.data, 1, 1)
    name, output, step = "bert.encoder.layer.1.intermediate.dense", 3, 1e-3
    layer = state.model.get_submodule(name)
    told = by_outputs(state, {name: layer}, [batch])[name]
    assert told.shape == (32,)
    slopes = []
    for place in range(batch["input_ids"].shape[1]):
        losses = []
        for sign in (1, -1):
            shift = torch.zeros(1, batch["input_ids"].shape[1], 32, dtype=torch.float64)
            shift[0, place, output] = sign * step
            copied = copy.deepcopy(state.model).double().eval()
            copied.get_submodule(name).register_forward_hook(lambda one, given, made, shift=shift: made + shift)
            losses.append(float(copied(**batch).loss.detach()))
        slopes.append((losses[0] - losses[1]) / (2 * step))
    assert float(told[output]) == pytest.approx(sum(slope**2 for slope in slopes), rel=1e-3)


def test_rates_by_gradients_need_a_loss(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="feature-extraction on this data has no loss of its own"):
        sparse(make_state(tmp_path, "feature-extraction"), rates="allocated")


def test_a_matrix_that_blocks_share_stays_shared(tmp_path: Path) -> None:
    state = state_of(TINY["llama"], tmp_path)
    first, second = (state.model.get_submodule(f"model.layers.{index}.mlp.down_proj") for index in (0, 1))
    second.weight = first.weight
    after = sparse(state)
    assert first.weight is second.weight
    told = "its matrix is that of model.layers.0.mlp.down_proj"
    assert after.figures["skipped"] == {"model.layers.1.mlp.down_proj": told}


def test_the_state_of_another_branch_keeps_its_weights(tmp_path: Path) -> None:
    state = state_of(TINY["llama"], tmp_path)
    before = copy.deepcopy(state.model.state_dict())
    sparse(state.branch())
    assert all(torch.equal(before[name], one) for name, one in state.model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"average": 0.9, "accumulate": 2, "weight_decay": 0.5}])
def test_training_leaves_masked_weights_and_all_that_is_kept_of_them_at_zero(options: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    mask = torch.rand(8, 6) < 0.5
    with torch.no_grad():
        model[0].weight.mul_(mask)
    start = copy.deepcopy(model.state_dict())
    rows = [{"x": torch.randn(5, 6), "y": torch.randn(5, 1)} for _ in range(6)]
    recipe = TrainingOptions(steps=6, learning_rate=0.05, checkpoint_every=5, precision="float32", **options)
    train(
        model, lambda epoch: rows, lambda one, batch: (one(batch["x"]) - batch["y"]).square().mean(), recipe,
        folder=tmp_path, total_steps=6, masks={"0.weight": mask},
    )  # fmt: skip
    assert (model[0].weight[~mask] == 0).all()
    assert (model[0].weight[mask] != start["0.weight"][mask]).all()
    held = load_file(tmp_path / CHECKPOINT)
    moments = [one for name, one in held.items() if name.startswith("optimizer.") and one.shape == mask.shape]
    assert len(moments) == 2
    assert all((one[~mask] == 0).all() and (one[mask] != 0).all() for one in moments)


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification", "text-generation"])
def test_recovery_keeps_zeros(task: str, tmp_path: Path) -> None:
    state = sparse(make_state(tmp_path, task), sparsity=0.7)
    before = copy.deepcopy(state.model.state_dict())
    after = distill(state, losses={"hidden": 1})
    assert after.figures["loss_after"] < 0.9 * after.figures["loss_before"]
    assert zeros(after.model, masked(after))["filled"] == {}
    assert all(not torch.equal(before[name], after.model.state_dict()[name]) for name in masked(after))


@pytest.mark.parametrize("step", WAYS)
def test_finetuning_keeps_zeros(step: str, tmp_path: Path) -> None:
    state = make_state(tmp_path, "text-classification")
    state.workshop.step.mkdir(parents=True)
    (state,) = PASSES[step](sparsity=0.7, **WAYS[step]).run(state)
    assert zeros(state.model, masked(state))["share"] == pytest.approx(0.7, abs=0.01)
    (after,) = Finetune(steps=10, learning_rate=0.005, precision="float32").run(state)
    assert zeros(after.model, masked(after))["filled"] == {}
    assert after.figures["best_step"] > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_precision_keeps_zeros(name: str, tmp_path: Path) -> None:
    state = sparse(state_of(TINY[name], tmp_path))
    for step in ("smoothquant", "crossquant", "gptq"):
        before = copy.deepcopy(state.model.state_dict())
        (state,) = PASSES[step](samples=16).run(state)
        assert any(not torch.equal(before[key], state.model.state_dict()[key]) for key in masked(state))
        assert zeros(state.model, masked(state))["filled"] == {}


def test_adapters_are_refused_on_a_sparse_model(tmp_path: Path) -> None:
    state = sparse(make_state(tmp_path, "text-classification"))
    with pytest.raises(TrainingError, match="adapters would fill the zeros"):
        distill(state, lora={"rank": 2})


def test_an_artifact_of_a_sparse_model_computes_the_same(tmp_path: Path) -> None:
    tiny = TINY["bert"]
    after = sparse(state_of(tiny, tmp_path / "state"))
    after.dense.source = "dense"
    Onnx(cache=False).run(after, tmp_path / "made")
    inputs = tiny.example(3, 7)
    met = next(iter(open_artifact(tmp_path / "made", Target())(inputs).values()))
    found = torch.from_numpy(met)[inputs["attention_mask"].bool()].flatten()
    torch.testing.assert_close(found, answer(after.model, inputs), rtol=1e-4, atol=1e-4)


def test_cuts_make_masks_stale_and_training_keeps_them() -> None:
    for name in ("ziplm", "drop_blocks", "minitron", "slice_hidden"):
        options = {"drop_blocks": {"remove": 1}, "slice_hidden": {"share": 0.5}, "minitron": {"parameters": 0.5}}
        step = PASSES[name](**options.get(name, {"speedups": [2]}))
        assert stale_after(step, frozenset({MASKS})) == {MASKS}
    for name in ("distill", "finetune", "calibrate", "gptq", "smoothquant", "crossquant"):
        assert stale_after(PASSES[name](), frozenset({MASKS})) == frozenset()


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    recovery = {"steps": 3, "batch_size": 8, "precision": "float32", "losses": {"hidden": 1}}
    return {
        "model": "my-encoder",
        "data": {"source": "reviews.txt", "train_rows": 64, "test_rows": 20},
        "target": {"runtime": "torch", "sequence": 16},
        "passes": [
            {"sparsify": {"sparsity": 0.5, "samples": 16}},
            {"distill": recovery},
            {"sparsify": {"sparsity": 0.75, "samples": 16}},
            {"distill": recovery},
        ],
        "export": ["huggingface"],
        "out": "out",
    }


def test_a_plan_raises_the_share_of_zeros_and_proves_after_each_step_that_they_stayed(plan: dict) -> None:
    result = compress(plan=plan)
    branch = result.report["branches"][0]
    assert branch["quality_before_recovery"] != branch["quality"]
    steps = branch["steps"]
    told = [step["figures"]["zeros"] for step in steps]
    assert [round(one["share"], 2) for one in told] == [0.5, 0.5, 0.75, 0.75]
    assert all(one["filled"] == {} for one in told)
    model = result.model
    layers = [one for one in model.encoder.modules() if isinstance(one, nn.Linear)]
    assert {round(float((one.weight == 0).float().mean()), 2) for one in layers} == {0.75}
    assert json.loads(Path("out/report.json").read_text())


def test_a_step_that_breaks_its_promise_is_found_out(plan: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.training.mask_gradients_", lambda masked: None)
    with pytest.raises(RuntimeError, match=r"promised to keep zeros and filled some: .'encoder"):
        compress(plan=plan)


def test_a_gradual_step_raises_the_share_of_zeros_along_a_cubic(plan: dict) -> None:
    plan["passes"] = [
        {"gradual": {"sparsities": {"first": 0.5, "last": 0.9, "stages": 3}, "passes": ["sparsify", "distill"]}}
    ]
    read = Plan.read(plan, Tables(PASSES, EXPORTERS))
    assert read.check() == []
    assert [one.step.do.sparsity for one in read.nodes() if one.step.name == "sparsify"] == [0.5, 0.85, 0.9]
    assert [node.branch for node in leaves(read.nodes())] == ["sparse-0.5", "sparse-0.85", "sparse-0.9"]
    assert Plan.read(read.to_yaml(), Tables(PASSES, EXPORTERS)).passes == read.passes
    assert "0 gradual: sparse-0.5, then sparse-0.85, then sparse-0.9" in explain(read)


@pytest.mark.parametrize(("gradual", "told"), [
    ({"sparsities": [0.7, 0.5], "passes": ["sparsify"]}, "0.5 stands after 0.7; expected rising sparsities"),
    ({"sparsities": {"first": 0.9, "last": 0.5, "stages": 2}, "passes": ["sparsify"]}, "expected rising sparsities"),
    ({"sparsities": {"first": 0.5, "last": 0.9}, "passes": ["sparsify"]}, "gradual.sparsities.*stages"),
    ({"sparsities": [0.5], "speedups": [2], "passes": ["sparsify"]}, "both speedups and sparsities are given"),
    ({"sparsities": [0.5], "passes": ["distill"]}, "none of them takes sparsity"),
    ({"sparsities": [0.5], "passes": [{"sparsify": {"sparsity": 0.5}}]}, "is the gradual step's to fill in"),
])  # fmt: skip
def test_shares_that_a_gradual_step_cannot_fill_in_are_told(gradual: dict, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        Plan.read({"model": "m", "passes": [{"gradual": gradual}]}, Tables(PASSES, EXPORTERS))


@pytest.mark.parametrize(("options", "told"), [
    ({"sparsity": 0.5, "runs": {"keep": 2, "of": 4}}, "both sparsity and runs are given"),
    ({"runs": {"keep": 4, "of": 4}}, r"4 of 4 keeps all; expected keep below of"),
    ({"runs": {"keep": 2, "of": 4}, "block": 4}, "runs have no block"),
    ({"runs": {"keep": 2, "of": 4}, "rates": "allocated"}, "expected rates: uniform"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_told(options: dict, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        Plan.read({"model": "m", "passes": [{"sparsify": options}]}, Tables(PASSES, EXPORTERS))
