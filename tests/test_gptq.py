"""GPTQ: its identities on matrices, what it leaves in models of every family, and that an artifact holds its grid."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers.pytorch_utils import Conv1D

from compress import checkpoint
from compress.contract import GRID, Part
from compress.errors import ExportError
from compress.plan import Plan, Tables
from compress.runtimes import open_artifact
from compress.target import Target
from exporters import EXPORTERS
from exporters.onnx import Onnx
from passes import PASSES
from passes.blocks import entered
from passes.gram import damped, inverse_factor, output_error
from passes.quantization.gptq import Gptq
from passes.quantization.grid import Grid
from passes.quantization.solve import gptq
from tests.conftest import TINY, answer, assert_one_model
from tests.paper import state_of
from tests.world import make_world

OUT, IN, TOKENS = 24, 96, 400


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (24, 96) and the Gram matrix of correlated inputs of very different sizes."""
    draw = torch.Generator().manual_seed(3)
    mix = torch.randn(IN, IN, generator=draw) / IN**0.5 + 0.3
    inputs = (
        torch.randn(TOKENS, IN, generator=draw) @ mix * torch.logspace(-1, 1, IN)[torch.randperm(IN, generator=draw)]
    )
    return torch.randn(OUT, IN, generator=draw), inputs.T @ inputs / TOKENS


def rtn(weight: torch.Tensor, bits: int, group: int, symmetric: bool = False) -> torch.Tensor:
    return Grid.fit(weight, bits, group, symmetric).nearest(weight)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("group", [16, 40, 96])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_loss_kept_on_the_way_is_that_of_the_outputs(layer, bits: int, group: int, order: bool) -> None:
    weight, gram = layer
    result, _, loss = gptq(weight, gram, bits, group, order=order)
    torch.testing.assert_close(loss, output_error(result - weight, damped(gram, 0.01)), rtol=1e-7, atol=0)
    assert output_error(result - weight, gram) < 0.75 * output_error(rtn(weight, bits, group) - weight, gram)


def test_the_factor_holds_the_inverse_of_what_is_left(layer) -> None:
    gram = damped(layer[1], 0.01)
    factor = inverse_factor(gram)
    torch.testing.assert_close(factor.T @ factor @ gram, torch.eye(IN, dtype=torch.float64), rtol=0, atol=1e-8)
    for index in (0, 40, IN - 1):
        left = torch.linalg.inv(gram[index:, index:])[0, 0]
        torch.testing.assert_close(factor[index, index] ** 2, left, rtol=1e-9, atol=0)


def test_blocks_change_nothing(layer, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer
    whole, _, loss = gptq(weight, gram, 4, 32)
    monkeypatch.setattr("passes.quantization.solve.BLOCK", 7)
    parts, _, same = gptq(weight, gram, 4, 32)
    assert torch.equal(whole, parts)
    assert abs(loss - same) < 1e-9 * loss


def test_the_order_helps_where_inputs_differ(layer) -> None:
    weight, gram = layer
    ordered, unordered = (
        output_error(gptq(weight, gram, 3, IN, order=order)[0] - weight, gram) for order in (True, False)
    )
    assert ordered < 0.95 * unordered


def test_with_independent_inputs_nothing_can_be_made_up_for(layer) -> None:
    weight, _ = layer
    gram = torch.diag(torch.linspace(1, 2, IN))
    assert torch.equal(gptq(weight, gram, 4, 32)[0], rtn(weight, 4, 32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_and_inputs_never_seen_get_none(layer, symmetric: bool) -> None:
    weight, gram = layer
    weight = torch.where(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5, 0.0, weight)
    gram = gram.clone()
    gram[7], gram[:, 7] = 0, 0
    result, grid, _ = gptq(weight, gram, 4, 32, symmetric=symmetric)
    assert (result[weight == 0] == 0).all()
    assert (result[:, 7] == 0).all()
    assert torch.equal(grid.nearest(result), result)
    rounded = rtn(weight, 4, 32, symmetric)
    assert (rounded[weight == 0] == 0).all()
    rounded[:, 7] = 0
    assert output_error(result - weight, gram) < output_error(rounded - weight, gram)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_weight_errs_by_a_step_at_most_and_the_grid_is_a_fixed_point(bits: int, symmetric: bool) -> None:
    weight = torch.randn(10, 50, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    weight[3] = weight[3].abs() + 1
    grid = Grid.fit(weight, bits, 16, symmetric)
    assert grid.scale.shape == (10, 4)
    rounded = grid.nearest(weight)
    steps = grid.scale.repeat_interleave(16, 1)[:, :50]
    assert ((rounded - weight).abs() <= 1.01 * steps).all()
    assert torch.equal(grid.nearest(rounded), rounded)
    if symmetric:
        assert (grid.zero == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("name", TINY)
def test_every_family_comes_out_on_its_grid_and_loads_as_it_was(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    state = state_of(tiny, tmp_path)
    before = copy.deepcopy(state.model)
    (after,) = Gptq(bits=4, group=16, samples=16).run(state)
    grid = after.facts[GRID.name]
    assert len(grid["layers"]) >= 2 * sum(stack.length for stack in after.layout.stacks.values())
    for layer in grid["layers"]:
        stored = matrix_of(after.model.get_submodule(layer))
        scale, zero = grid[f"{layer}.scale"], grid[f"{layer}.zero"]
        assert torch.equal(Grid(scale, zero.float(), 4, 16).nearest(stored), stored)
        assert not torch.equal(stored, matrix_of(before.get_submodule(layer)))
    untouched = before.get_input_embeddings()
    if untouched is not None and name not in ("vit", "whisper"):
        assert torch.equal(untouched.weight, after.model.get_input_embeddings().weight)
    checkpoint.save(after.model, tmp_path / "saved")
    assert_one_model(type(after.model).from_pretrained(tmp_path / "saved").eval(), after.model, tiny.example())


def test_a_block_sees_what_the_blocks_before_it_became(tmp_path: Path) -> None:
    state = state_of(TINY["llama"], tmp_path)
    batches = list(state.data.batches("calibration", 16))
    last = None
    for block in entered(state.model, state.layout, batches):
        for parameter in block.module.parameters():
            parameter.data.mul_(0.5)
        last = block
    call = last.calls[-1]
    with torch.no_grad():
        expected = state.model.base_model(**batches[-1], output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(call["hidden_states"], expected, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_blocks_share_stays_shared_and_is_rounded_once(tmp_path: Path) -> None:
    state = state_of(TINY["llama"], tmp_path)
    first, second = (state.model.get_submodule(f"model.layers.{index}.mlp.down_proj") for index in (0, 1))
    second.weight = first.weight
    (after,) = Gptq(bits=4, group=16, samples=8).run(state)
    assert first.weight is second.weight
    told = "its matrix is that of model.layers.0.mlp.down_proj"
    assert after.figures["skipped"] == {"model.layers.1.mlp.down_proj": told}


def test_gptq_is_nearer_to_the_model_than_rounding(tmp_path: Path) -> None:
    tiny = TINY["llama"]
    errors = {}
    for method in ("gptq", "rtn"):
        (after,) = Gptq(bits=3, group=16, method=method).run(state_of(tiny, tmp_path / method))
        inputs = after.data.tensors
        errors[method] = (answer(after.model, inputs) - answer(tiny.build(), inputs)).square().mean()
        assert 0 < after.figures["loss"] < 1
    assert errors["gptq"] < errors["rtn"]


def matrix_of(layer: torch.nn.Module) -> torch.Tensor:
    """The weight (out, in) of a layer."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def codes_of(folder: Path) -> list[np.ndarray]:
    """What the matrices (in, out) of an artifact's `MatMulNBits` in 4 bits stand for."""
    graph = onnx.load(folder / "model.onnx").graph
    held = {one.name: numpy_helper.to_array(one, str(folder)) for one in graph.initializer}
    found = []
    for node in graph.node:
        told = {entry.name: entry.i for entry in node.attribute}
        if node.op_type != "MatMulNBits" or told["bits"] != 4:
            continue
        packed, scale, zeros = (held[name] for name in node.input[1:4])
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(told["N"], -1, told["block_size"])
        zero = np.stack([zeros & 15, zeros >> 4], -1).reshape(told["N"], -1)[:, : scale.reshape(told["N"], -1).shape[1]]
        values = (codes - zero[:, :, None].astype(np.float32)) * scale.reshape(told["N"], -1)[:, :, None]
        found.append(values.reshape(told["N"], -1)[:, : told["K"]].T)
    return found


@pytest.mark.parametrize(("name", "options"), [
    ("bert", {"bits": 4, "group": 16}),
    ("llama-tied", {"bits": 3, "group": None, "symmetric": True}),
    ("gpt2", {"bits": 4, "group": 16, "order": False}),
])  # fmt: skip
def test_the_artifact_holds_the_very_grid(name: str, options: dict, tmp_path: Path) -> None:
    (after,) = Gptq(samples=8, **options).run(state_of(TINY[name], tmp_path / "state"))
    folder = tmp_path / "made"
    after.dense.source = "dense"
    made = Onnx(quantize="weight_only", cache=False).run(after, folder)
    assert made.figures["skipped"] == {}
    layers = [after.model.get_submodule(layer) for layer in after.facts[GRID.name]["layers"]]
    rows = {row.numpy().tobytes() for layer in layers for row in matrix_of(layer) + 0.0}
    columns = [column + np.float32(0) for matrix in codes_of(folder) for column in matrix.T]
    assert len(columns) == sum(len(matrix_of(layer)) for layer in layers)
    assert all(np.ascontiguousarray(column).tobytes() in rows for column in columns)
    inputs = TINY[name].example(3, 7)
    expected = answer(after.model, inputs).numpy()
    met = next(iter(open_artifact(folder, Target())(inputs).values()))[inputs["attention_mask"].numpy().astype(bool)]
    assert np.abs(met.flatten() - expected).max() < 0.1 * np.abs(expected).max()


def test_a_grid_that_the_operator_cannot_hold_is_told(tmp_path: Path) -> None:
    (after,) = Gptq(bits=4, group=12, samples=8).run(state_of(TINY["bert"], tmp_path / "state"))
    with pytest.raises(ExportError, match="12 inputs share a scale; the operator takes 16"):
        Onnx(quantize="weight_only").run(after, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_plan_knows_what_an_export_needs_and_that_nothing_may_follow(tmp_path: Path) -> None:
    make_world(tmp_path)
    plan = {"model": str(tmp_path / "my-encoder"), "data": {"source": str(tmp_path / "reviews.txt")}}
    export = ["huggingface", {"onnx": {"quantize": "weight_only"}}]

    def problems(*passes: object) -> list[str]:
        return Plan.read({**plan, "passes": list(passes), "export": export}, Tables(PASSES, EXPORTERS)).check()

    assert problems("calibrate", "gptq") == []
    (missing,) = problems("calibrate")
    assert "export[1].onnx" in missing
    assert "needs 'grid'" in missing
    assert "expected gptq as the last step" in missing
    late = problems("gptq", {"drop_blocks": {"remove": 1}})
    assert any("has fixed the number format; expected it before" in problem for problem in late)
    assert Gptq().touches == Part.VALUES | Part.FORMAT
