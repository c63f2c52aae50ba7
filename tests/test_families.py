"""The table of families: names, shapes and what it says of models it doesn't know."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers

from compress.errors import LayoutError
from compress.families import FAMILIES, layout_of
from tests.conftest import TINY, Tiny


def test_every_family_has_a_tiny_model() -> None:
    assert {tiny.kind for tiny in TINY.values()} == set(FAMILIES)


def test_the_table_needs_neither_torch_nor_transformers() -> None:
    program = "import sys, compress.families; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_sites_fit_their_modules(tiny: Tiny) -> None:
    model = tiny.build()
    layout = layout_of(model)
    for axis in layout.axes.values():
        ends: dict[tuple[str, int], int] = {}
        for site in axis.sites:
            module = model.get_submodule(site.module)
            positions = axis.positions(site, range(axis.units))
            features = axis_features(module)[site.dim]
            assert positions.max() < features
            ends[site.module, site.dim] = ends.get((site.module, site.dim), 0) + len(positions)
        for (path, dim), covered in ends.items():
            assert covered == axis_features(model.get_submodule(path))[dim], f"{axis.name} leaves part of {path}"


def axis_features(module: torch.nn.Module) -> tuple[int, int]:
    """Outputs and inputs, by whatever names the module has for them."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, torch.nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    return module.nf, module.nx


def test_names_tell_block_and_kind(tiny: Tiny) -> None:
    layout = layout_of(tiny.build())
    for name, axis in layout.axes.items():
        assert name == axis.name
        assert axis.kind in {"heads", "columns"}
        if axis.block:
            assert name in {f"{axis.block}.heads", f"{axis.block}.cross_heads", f"{axis.block}.columns"}
    for stack in layout.stacks.values():
        blocks = {axis.block for axis in layout.axes.values() if axis.block.startswith(f"{stack.module}.")}
        assert blocks == {f"{stack.module}.{index}" for index in range(stack.length)}


def test_grouped_queries_go_with_their_key() -> None:
    layout = layout_of(TINY["llama"].build())
    axis = layout.axes["model.layers.1.heads"]
    widths = {(site.module.rpartition(".")[2], site.dim): site.width for site in axis.sites}
    assert axis.units == 3
    assert widths == {("q_proj", 0): 12, ("k_proj", 0): 6, ("v_proj", 0): 6, ("o_proj", 1): 12}


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("mpnet", {"mpnet.encoder.heads"}),
        ("t5", {"encoder.heads", "decoder.heads", "decoder.cross_heads"}),
        ("bert", set()),
    ],
)
def test_tables_of_positions_make_heads_alike(name: str, shared: set[str]) -> None:
    axes = layout_of(TINY[name].build()).axes
    assert {axis.name for axis in axes.values() if not axis.block} == shared
    assert all(axes[name].least == 1 for name in shared)


@pytest.mark.parametrize(
    ("auto", "name", "stacks"),
    [
        ("AutoModel", "bert", {"encoder.layer"}),
        ("AutoModelForTokenClassification", "bert", {"bert.encoder.layer"}),
        ("AutoModel", "gpt2", {"h"}),
        ("AutoModelForSequenceClassification", "llama", {"model.layers"}),
        ("AutoModelForQuestionAnswering", "qwen3", {"transformer.layers"}),
        ("AutoModelForTokenClassification", "t5", {"transformer.encoder.block"}),
        ("AutoModelForSequenceClassification", "t5", {"transformer.encoder.block", "transformer.decoder.block"}),
        ("AutoModelForAudioClassification", "whisper", {"encoder.layers"}),
    ],
)
def test_the_base_model_is_found_in_every_task(auto: str, name: str, stacks: set[str]) -> None:
    model = Tiny(auto, TINY[name].kind, TINY[name].entries).build()
    layout = layout_of(model)
    assert set(layout.stacks) == stacks
    for axis in layout.axes.values():
        layout = layout.cut(model, axis.name, [0])
    assert layout_of(model) == layout


def test_an_unknown_model_type_names_the_nearest() -> None:
    config = transformers.AutoConfig.for_model("qwen2_moe", num_hidden_layers=1, hidden_size=16, vocab_size=20)
    model = torch.nn.Linear(1, 1)
    model.config = config
    with pytest.raises(LayoutError, match=r"no family for models of type 'qwen2_moe' \(did you mean 'qwen2'\?\)"):
        layout_of(model)
