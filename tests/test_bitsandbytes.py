"""Bitsandbytes: what the library stores is smaller and near, and loads plainly with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress import checkpoint
from compress.contract import Part
from compress.errors import ExportError, LayoutError
from compress.families import layout_of
from exporters.huggingface import HuggingFace
from exporters.onnx import Onnx
from passes.quantization.bitsandbytes import Bitsandbytes
from tests.conftest import TINY, answer
from tests.paper import state_of

pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
WAYS = [{"method": "nf4"}, {"method": "nf4", "double": True}, {"method": "int8"}]


@pytest.mark.parametrize("options", WAYS, ids=["nf4", "double", "int8"])
@pytest.mark.parametrize("name", ["bert", "llama", "llama-tied", "gpt2", "mpnet"])
def test_it_is_smaller_and_near_and_loads_with_the_same_bits(name: str, options: dict, tmp_path: Path) -> None:
    state = state_of(TINY[name], tmp_path)
    layout, inputs = state.layout, TINY[name].example()
    before = answer(state.model, inputs)
    (after,) = Bitsandbytes(**options).run(state)
    near = answer(after.model, inputs)
    assert 0 < (near - before).norm() < (0.7 if options["method"] == "nf4" else 0.2) * before.norm()
    sizes = after.figures["stored_bytes"]
    assert sizes["after"] < 0.8 * sizes["before"]
    assert after.layout == layout
    checkpoint.save(after.model, tmp_path / "saved")
    loaded = type(after.model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(answer(loaded, inputs), near)
    assert layout_of(loaded) == layout
    after.dense.source, after.model = "dense", loaded  # as a stored step is gone on from
    HuggingFace().run(after, tmp_path / "made")
    assert torch.equal(answer(type(loaded).from_pretrained(tmp_path / "made").eval(), inputs), near)


def test_other_exports_refuse_it(tmp_path: Path) -> None:
    (after,) = Bitsandbytes().run(state_of(TINY["bert"], tmp_path))
    with pytest.raises(ExportError, match="weights are those of bitsandbytes"):
        Onnx().run(after, tmp_path / "made")
    assert Bitsandbytes().touches == Part.VALUES | Part.FORMAT


def test_a_model_that_was_cut_is_refused(tmp_path: Path) -> None:
    state = state_of(TINY["bert"], tmp_path)
    name = next(axis for axis in state.layout.axes if axis.endswith("columns"))
    state.cut(name, range(5))
    with pytest.raises(LayoutError, match="room for one record"):
        list(Bitsandbytes().run(state))
