"""CrossQuant: nothing is clipped, less is rounded to 0, and the model computes what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from passes.quantization.cross import Crossquant, column_part, kernel, steps
from tests.conftest import TINY, precise
from tests.paper import error_in_int8, state_of


@pytest.fixture
def rows() -> torch.Tensor:
    """Activations (300, 64), one channel of which is forty times as large."""
    draw = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    draw[:, 5] *= 40
    return draw


@pytest.mark.parametrize("row", [0.0, 0.15, 0.5, 1.0])
def test_nothing_is_clipped(rows, row: float) -> None:
    columns = rows.abs().amax(0)
    assert (rows / steps(rows, columns, row)).abs().max() <= 127 * (1 + 1e-5)


def test_less_is_rounded_to_zero_the_more_columns_count(rows) -> None:
    columns = rows.abs().amax(0)
    share = {row: kernel(rows, steps(rows, columns, row)) / rows.numel() for row in (1.0, 0.5, 0.15)}
    assert share[1.0] == kernel(rows, steps(rows)) / rows.numel() > 0.08
    assert share[0.15] < 0.5 * share[0.5] < 0.2 * share[1.0]
    assert share[0.15] < 0.02


@pytest.mark.parametrize("row", [0.0, 0.15, 0.5])
def test_rows_of_what_folding_leaves_have_no_coarser_steps(rows, row: float) -> None:
    part = column_part(rows.abs().amax(0), row)
    left = rows / part
    assert (steps(left) * part <= steps(rows, rows.abs().amax(0), row) * (1 + 1e-5)).all()
    assert kernel(left, steps(left)) <= kernel(rows, steps(rows, rows.abs().amax(0), row))


def test_an_empty_column_and_an_empty_row_are_no_trouble() -> None:
    rows = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert kernel(rows, steps(rows, rows.abs().amax(0), 0.15)) == 0
    assert column_part(torch.tensor([0.0, 1.0]), 0.15).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", TINY)
def test_the_model_computes_what_it_did_and_every_layer_is_told_of(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    state, inputs = state_of(tiny, tmp_path), tiny.example()
    if "text" in tiny.inputs:  # T5's attention, which is not scaled, makes of errors in float32 anything
        state.model.double()
    (after,) = Crossquant(samples=16).run(state)
    torch.testing.assert_close(precise(after.model, inputs), precise(tiny.build(), inputs), rtol=1e-3, atol=1e-3)
    kernels, skipped = after.figures["kernels"], after.figures["skipped"]
    assert kernels
    for layer, share in kernels.items():
        assert 0 <= share["cross"] <= 1
        if layer in skipped:
            assert share["after"] == pytest.approx(share["row"], abs=2e-3)
        else:
            assert share["after"] <= share["cross"] + 1e-3


def test_int8_loses_less_where_a_channel_is_large(tmp_path: Path) -> None:
    plain, _ = error_in_int8(TINY["llama"], tmp_path / "plain", quantize="int8_dynamic")
    crossed, figures = error_in_int8(
        TINY["llama"], tmp_path / "crossed", Crossquant(samples=16), quantize="int8_dynamic"
    )
    assert crossed < 0.5 * plain
    shares = figures["kernels"]["model.layers.0.self_attn.q_proj"]
    assert shares["after"] < 0.2 * shares["row"]
