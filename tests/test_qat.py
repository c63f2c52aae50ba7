"""Training on a grid: products are those of rounded factors, zeros stay, and artifacts are what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compress.contract import GRID, MASKS, Part
from compress.errors import ExportError
from compress.runtimes import open_artifact
from compress.target import Target
from exporters.compressed_tensors import CompressedTensors
from exporters.onnx import Onnx
from passes.distillation.distill import Distill
from passes.pruning.sparse.sparsify import Sparsify
from passes.quantization.grid import Grid
from passes.quantization.qat import Qat
from passes.quantization.rounded import Range, Rounded, on_grid
from tests.conftest import TINY, answer
from tests.paper import state_of
from tests.test_distill import distill, make_state
from tests.test_gptq import matrix_of
from tests.world import power_cut

INT4 = {"weights": 4, "activations": None, "group": 16}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def test_a_range_rounds_as_onnx_does_and_passes_gradients_within() -> None:
    values = torch.tensor([-1.5, -1.0, -0.3, 0.0, 0.4, 2.9, 4.0], requires_grad=True)
    one = Range()
    one.see(torch.tensor([-1.0, 3.0]))
    scale, zero = one.scale_and_zero
    near = one(values)
    codes = (near / scale).round() + zero
    assert codes.tolist() == [0, 0, *(values / scale).round().add(zero).tolist()[2:6], 255]
    torch.testing.assert_close(near, (codes - zero) * scale, rtol=1e-6, atol=1e-6)
    assert near[3] == 0
    near.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("options", [{}, INT4], ids=["int8", "int4"])
def test_every_family_computes_rounded_and_ends_on_its_grid(name: str, options: dict, tmp_path: Path) -> None:
    state = state_of(TINY[name], tmp_path)
    inputs, before = TINY[name].example(), answer(state.model, TINY[name].example())
    kinds = [type(module) for module in state.model.modules()]
    with on_grid(state, Qat(**options)) as skipped:
        assert skipped == {}
        rounded = answer(state.model, inputs)
        layers = {layer: module for layer, module in state.model.named_modules() if isinstance(module, Rounded)}
        expected = {layer: module.grid().nearest(module.matrix().detach()) for layer, module in layers.items()}
    assert not torch.equal(rounded, before)
    assert kinds == [type(module) for module in state.model.modules()]
    grid = state.facts[GRID.name]
    assert grid["layers"] == list(layers)
    assert len(layers) >= 2 * sum(stack.length for stack in state.layout.stacks.values())
    for layer in grid["layers"]:
        stored = matrix_of(state.model.get_submodule(layer))
        assert torch.equal(stored, expected[layer])
        again = Grid(grid[f"{layer}.scale"], grid[f"{layer}.zero"].float(), grid["bits"], grid["groups"][layer])
        assert torch.equal(again.nearest(stored), stored)
    if options:
        torch.testing.assert_close(answer(state.model, inputs), rounded)


@pytest.mark.parametrize("options", [{}, INT4], ids=["int8", "int4"])
def test_gradients_reach_every_weight(options: dict, tmp_path: Path) -> None:
    state = state_of(TINY["llama"], tmp_path)
    with on_grid(state, Qat(**options)):
        state.model(**TINY["llama"].example()).logits.square().mean().backward()
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in state.model.parameters())


@pytest.mark.parametrize("task", ["text-classification", "text-generation", "feature-extraction"])
@pytest.mark.parametrize("options", [{}, INT4], ids=["int8", "int4"])
def test_training_on_the_grid_loses_less_than_rounding_does(task: str, options: dict, tmp_path: Path) -> None:
    state = make_state(tmp_path, task)
    after = distill(state, qat=options, learning_rate=0.001, losses={"hidden": 1})
    assert after.figures["loss_after"] < 0.95 * after.figures["loss_before"]  # which is that of plain rounding
    for layer in after.facts[GRID.name]["layers"]:
        told = after.facts[GRID.name]
        stored = matrix_of(after.model.get_submodule(layer))
        grid = Grid(told[f"{layer}.scale"], told[f"{layer}.zero"].float(), told["bits"], told["groups"][layer])
        assert torch.equal(grid.nearest(stored), stored)


def test_zeros_stay(tmp_path: Path) -> None:
    state = make_state(tmp_path, "text-classification")
    (sparse,) = Sparsify(sparsity=0.5, method="magnitude").run(state)
    masks = sparse.facts[MASKS.name]
    after = distill(sparse, qat={}, learning_rate=0.001)
    assert MASKS in Distill(qat={}).keeps
    for name, mask in masks.items():
        weight = after.model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight != 0).float().mean() > 0.4


def test_a_matrix_that_blocks_share_has_one_grid_and_one_range(tmp_path: Path) -> None:
    state = state_of(TINY["llama"], tmp_path)
    first, second = (state.model.get_submodule(f"model.layers.{index}.mlp.down_proj") for index in (0, 1))
    second.weight = first.weight
    with on_grid(state, Qat()):
        assert first.read is second.read
    assert first.weight is second.weight
    assert "model.layers.1.mlp.down_proj" not in state.facts[GRID.name]["layers"]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def run(folder: str) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        state = make_state(tmp_path / folder, "text-classification")
        return distill(state, qat={}, steps=8, checkpoint_every=3).model.state_dict()

    from passes.distillation.compare import Comparison

    straight = run("straight")
    with power_cut(Comparison, "losses", 9):
        run("killed")
    resumed = run("killed")
    assert all(torch.equal(one, resumed[name]) for name, one in straight.items())


@pytest.mark.parametrize(("name", "overflows"), [("bert", False), ("bert", True), ("gpt2", False)])
def test_the_artifact_is_what_was_trained(
    name: str, overflows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.trained.overflows", lambda: overflows)
    monkeypatch.setattr("exporters.surgery.SMALL", 1 << 20)  # tables as they are, which the model has as well
    state = state_of(TINY[name], tmp_path / "state")
    state.dense.source = "dense"
    inputs = TINY[name].example(3, 7)
    plain = state.branch()
    with on_grid(state, Qat()):
        trained = answer(state.model, inputs).numpy()
    errors = {}
    for what, one, expected in (("qat", state, trained), ("ptq", plain, answer(plain.model, inputs).numpy())):
        Onnx(quantize="int8_static", cache=False).run(one, tmp_path / what)
        met = next(iter(open_artifact(tmp_path / what, Target())(inputs).values()))
        errors[what] = np.abs(met[inputs["attention_mask"].numpy().astype(bool)].flatten() - expected).max()
    assert errors["qat"] < 1e-3 * np.abs(trained).max()
    assert errors["qat"] < 0.02 * errors["ptq"]


@pytest.mark.parametrize("bits", [8, 4])
def test_other_artifacts_hold_the_grid_as_well(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra compressed-tensors")
    state = state_of(TINY["llama"], tmp_path / "state")
    state.dense.source = "dense"
    with on_grid(state, Qat(weights=bits, activations=None)):
        pass
    made = CompressedTensors().run(state, tmp_path / "vllm")  # which compares weights bit for bit
    assert made.figures["layers"] == len(state.facts[GRID.name]["layers"])
    made = Onnx(quantize="weight_only", cache=False).run(state, tmp_path / "made")
    assert made.figures["skipped"] == {}
    assert made.figures["weight_only_products"] >= 12


def test_options_that_contradict_are_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"qat": {"group": 32}}, "expected no group"),
        ({"qat": {"weights": 4}}, "expected activations: null"),
        ({"qat": {}, "lora": {}}, "expected one of the two"),
    ):
        with pytest.raises(ValidationError, match=said):
            Distill(**options)
    assert Distill(qat={}).touches == Part.VALUES | Part.FORMAT
    assert Distill(qat={}).provides == {GRID}
    assert Distill().touches == Part.VALUES
    assert not Distill().provides
    state = state_of(TINY["bert"], tmp_path / "state")
    with on_grid(state, Qat()):
        pass
    with pytest.raises(ExportError, match="ranges of qat's training; expected no 'samples'"):
        Onnx(quantize="int8_static", samples=4).run(state, tmp_path / "made")
