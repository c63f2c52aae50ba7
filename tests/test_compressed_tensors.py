"""Checkpoints of compressed-tensors: they hold gptq's very grid, and what the format can't hold is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.contract import GRID
from compress.errors import ExportError
from compress.plan import Plan, Tables
from compress.runtimes import open_artifact
from compress.target import Target
from exporters import EXPORTERS
from exporters.compressed_tensors import CompressedTensors
from passes import PASSES
from passes.quantization.gptq import Gptq
from tests.conftest import TINY
from tests.paper import state_of
from tests.world import make_world


def rounded(name: str, folder: Path, **options):
    (after,) = Gptq(samples=8, **{"symmetric": True, **options}).run(state_of(TINY[name], folder / "state"))
    after.dense.source = "dense"
    return after


@pytest.mark.parametrize(
    ("name", "options", "whole"),
    [
        ("llama", {"bits": 4, "group": 12}, {"down_proj"}),  # 29 columns, which 12 does not divide
        ("llama-tied", {"bits": 4, "group": None}, set()),
        ("qwen3", {"bits": 8, "group": None}, set()),
        ("bert", {"bits": 8, "group": 8}, {"layer.0.output.dense", "layer.1.output.dense", "layer.2.output.dense"}),
    ],
)
def test_the_checkpoint_holds_the_very_grid(name: str, options: dict, whole: set, tmp_path: Path) -> None:
    state = rounded(name, tmp_path, **options)
    made = CompressedTensors().run(state, tmp_path / "made")
    assert made.worst_error < 1e-5
    assert made.precision == "weight_only"
    grid, stored = state.facts[GRID.name], load_file(tmp_path / "made" / "model.safetensors")
    assert {layer for layer in grid["layers"] if f"{layer}.weight_packed" not in stored} == set(made.figures["skipped"])
    assert all(any(layer.endswith(one) for one in whole) for layer in made.figures["skipped"])
    assert made.figures["layers"] == len(grid["layers"]) - len(made.figures["skipped"])
    for layer in grid["layers"]:
        if layer not in made.figures["skipped"]:
            rows, inputs = stored[f"{layer}.weight_shape"].tolist()
            assert f"{layer}.weight" not in stored
            assert stored[f"{layer}.weight_packed"].shape == (rows, -(-inputs * grid["bits"] // 32))
            assert torch.equal(stored[f"{layer}.weight_scale"], grid[f"{layer}.scale"])
    told = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert told["config_groups"]["group_0"]["weights"]["num_bits"] == options["bits"]
    inputs = TINY[name].example(3, 7)
    met = open_artifact(tmp_path / "made", Target())(inputs)
    with torch.no_grad():
        expected = state.model(**inputs)[0]
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(next(iter(met.values())))[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    for options, said in (({"symmetric": False}, "zeros of its own"), ({"bits": 3}, "met a grid of 3")):
        with pytest.raises(ExportError, match=said):
            CompressedTensors().run(rounded("llama", tmp_path, **options), tmp_path / "made")
    with pytest.raises(ExportError, match="no layer can be stored: it is a Conv1D"):
        CompressedTensors().run(rounded("gpt2", tmp_path), tmp_path / "made")
    state = state_of(TINY["llama"], tmp_path / "cut")
    state.cut("model.layers.0.columns", range(8))
    (after,) = Gptq(samples=8, symmetric=True).run(state)
    with pytest.raises(ExportError, match="layers of unlike widths"):
        CompressedTensors().run(after, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_weights_that_read_back_otherwise_are_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = rounded("llama", tmp_path)
    with torch.no_grad():
        state.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-4
    with pytest.raises(ExportError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' reads back otherwise"):
        CompressedTensors().run(state, tmp_path / "made")


def test_a_missing_package_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = rounded("llama", tmp_path)
    monkeypatch.setattr("exporters.compressed_tensors.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'hf-compress\[compressed-tensors\]'"):
        CompressedTensors().run(state, tmp_path / "made")


def test_a_plan_knows_that_it_needs_a_grid(tmp_path: Path) -> None:
    make_world(tmp_path)
    head = {"model": str(tmp_path / "my-encoder"), "data": {"source": str(tmp_path / "reviews.txt")}}
    tables = Tables(PASSES, EXPORTERS)
    (missing,) = Plan.read({**head, "passes": ["calibrate"], "export": ["compressed_tensors"]}, tables).check()
    assert "needs 'grid'" in missing
    good = {"passes": [{"gptq": {"symmetric": True}}], "export": ["compressed_tensors"]}
    assert Plan.read({**head, **good}, tables).check() == []
