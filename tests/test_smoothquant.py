"""SmoothQuant: scales move and nothing else, for every family; what int8 then loses is less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from passes.quantization.smooth import Smoothquant, scales
from tests.conftest import TINY, precise
from tests.paper import error_in_int8, state_of

PRE_NORM = (
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "vit", "whisper", "t5",
    "t5-gated",
)  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_the_model_computes_what_it_did(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    (after,) = Smoothquant(samples=16).run(state_of(tiny, tmp_path))
    assert (
        after.figures["norms"] >= 4 if name in PRE_NORM else after.figures["norms"] <= 2
    )  # of a head, of a narrower embedding
    assert all(after.figures["skipped"].values())
    inputs = tiny.example()
    torch.testing.assert_close(precise(after.model, inputs), precise(tiny.build(), inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_every_norm_before_a_layer_gives_its_scales_away(name: str, tmp_path: Path) -> None:
    (after,) = Smoothquant(samples=16).run(state_of(TINY[name], tmp_path))
    assert after.figures["norms"] >= 6  # two in each of three blocks
    told = list(after.figures["outliers"].values())
    assert np.mean([one["after"] for one in told]) < np.mean([one["before"] for one in told])


def test_all_strength_makes_channels_equal_and_none_the_weights() -> None:
    activations, weights = torch.tensor([8.0, 2.0, 0.0]), torch.tensor([1.0, 4.0, 5.0])
    assert torch.equal(activations[:2] / scales(activations, weights, 1.0)[:2], torch.ones(2))
    assert torch.equal(weights[:2] * scales(activations, weights, 0.0)[:2], torch.ones(2))
    half = scales(activations, weights, 0.5)
    torch.testing.assert_close(activations[:2] / half[:2], weights[:2] * half[:2])
    assert half[2] == 1


def test_a_tied_head_keeps_its_scale(tmp_path: Path) -> None:
    (after,) = Smoothquant(samples=8).run(state_of(TINY["llama-tied"], tmp_path))
    assert "'lm_head' that reads it is used elsewhere" in after.figures["skipped"]["model.norm"]


def test_int8_loses_less_where_channels_are_far_apart(tmp_path: Path) -> None:
    tiny, export = TINY["llama"], {"quantize": "int8_static", "samples": 16}
    plain, _ = error_in_int8(tiny, tmp_path / "plain", **export)
    smooth, _ = error_in_int8(tiny, tmp_path / "smooth", Smoothquant(samples=16), **export)
    assert smooth < 0.5 * plain
