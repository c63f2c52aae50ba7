"""Minitron: importance as numbers, shapes under a budget, and the pass from plan to a model that stock loads."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress import checkpoint
from compress.errors import LayoutError, ReachError, TrainingError
from compress.families import layout_of
from compress.record import record_of
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.distillation.distill import Distill
from passes.distillation.losses.embeddings import similarity_distance
from passes.pruning.uniform.candidates import next_token_loss, rescale_, top
from passes.pruning.uniform.importance import Score, add_back, influence, per_row
from passes.pruning.uniform.minitron import Minitron
from passes.pruning.uniform.observe import measure_importance, removal_losses
from passes.pruning.uniform.shapes import NEAR, space_of
from tests.conftest import TINY, answer, precise
from tests.paper import Paper, state_of

STATISTICS = ("l2", "mean", "variance")


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Split:
    """Texts whose every split holds all rows."""

    def __init__(self, texts):
        self.count = lambda split: texts.rows
        self.batches = lambda split, size, **words: texts.batches(split, size)


def trainable(name, folder):
    state = state_of(TINY[name], folder)
    state.data = Split(state.data)
    return state


def score(rows, batch, sequence, mask=None):
    found = Score(batch)
    for row in rows:
        found.add_(per_row(row, mask, sequence))
    return found.value()


# Importance


@pytest.mark.parametrize("batch", STATISTICS)
@pytest.mark.parametrize("sequence", STATISTICS)
def test_scores_stream_permute_and_leave_padding_out(batch, sequence):
    rows, order = values(6, 5, 7), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    whole = score([rows], batch, sequence)
    torch.testing.assert_close(score(rows.split(2), batch, sequence), whole)
    torch.testing.assert_close(score([rows[..., order]], batch, sequence), whole[order])
    padded, mask = torch.cat([rows, torch.full((6, 2, 7), 99.0)], 1), torch.tensor([[1] * 5 + [0] * 2] * 6)
    torch.testing.assert_close(score([padded], batch, sequence, mask), whole)
    with_dead = torch.cat([rows, torch.zeros(6, 5, 1)], 2)
    assert top(score([with_dead], batch, sequence), 7) == list(range(7))


def test_statistics_are_what_they_are_called():
    rows = values(4, 5, 3).double()
    torch.testing.assert_close(score([rows], "l2", "mean"), rows.float().abs().mean(1).double().norm(dim=0))
    torch.testing.assert_close(score([rows], "mean", "l2"), rows.float().norm(dim=1).double().mean(0))
    spread = rows.float().var(1, correction=0).double()
    torch.testing.assert_close(score([rows], "variance", "variance"), spread.var(0, correction=0))


def test_for_one_text_l2_and_mean_over_texts_are_the_same():
    torch.testing.assert_close(score([values(1, 5, 7)], "l2", "mean"), score([values(1, 5, 7)], "mean", "mean"))


def test_influence_is_nothing_where_a_block_does_nothing():
    states = values(2, 3, 8)
    assert influence(states, 2 * states).max() < 1e-6
    torch.testing.assert_close(influence(states, -states), torch.full((2, 3), 2.0))


def test_heads_take_back_what_goes_in_mirror_order():
    heads = values(5, 2, 3)
    mended = add_back(heads, [4, 0, 3, 1, 2], kept=3)
    torch.testing.assert_close(mended[3], 2 * heads[3] - heads[1])  # the last kept and the first removed
    torch.testing.assert_close(mended[0], 2 * heads[0] - heads[2])
    torch.testing.assert_close(mended[4], heads[4])
    assert torch.equal(add_back(heads, [4, 0, 3, 1, 2], kept=5), heads)


def idle_(model, block):
    """Let a block of Llama add nothing to the stream."""
    with torch.no_grad():
        for projection in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp.down_proj):
            for parameter in projection.parameters():
                parameter.zero_()


def test_an_idle_block_turns_and_loses_nothing(tmp_path):
    state = state_of(TINY["llama-tied"], tmp_path)
    idle_(state.model, 1)
    batches = list(state.data.batches("calibration", 16))
    found = measure_importance(state.model, [], [], {"model.layers": 3}, batches).blocks["model.layers"]
    losses = removal_losses(state.model, "model.layers", 3, lambda: next_token_loss(state.model, batches))
    assert (found[1] < 1e-6, losses[1]) == (True, 0.0)
    assert found[[0, 2]].min() > 1e-3
    assert losses[[0, 2]].abs().min() > 1e-3
    before = precise(state.model, TINY["llama-tied"].example())
    (result,) = Minitron(blocks=2, recovery_steps=0).run(state)
    torch.testing.assert_close(precise(result.model, TINY["llama-tied"].example()), before, rtol=1e-9, atol=1e-9)
    assert record_of(result.model.config)["blocks"] == {"layers": [0, 2]}
    (result,) = Minitron(blocks=2, depth="perplexity", recovery_steps=0).run(state)
    assert record_of(result.model.config)["blocks"]["layers"] == top(losses, 2)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_dead_units_go_first_and_are_not_missed(name, tmp_path):
    state = state_of(TINY[name], tmp_path)
    dead = {axis.name: [1] for axis in state.layout.axes.values()}
    with torch.no_grad():
        for axis in state.layout.axes.values():
            for site in axis.sites:
                module = state.model.get_submodule(site.module)
                if site.dim == 0 and not isinstance(module, nn.Embedding):
                    for parameter in module.parameters():
                        parameter[axis.positions(site, dead[axis.name])] = 0
    before = precise(state.model, TINY[name].example())
    (result,) = Minitron(columns=28, heads=2, recovery_steps=0).run(state)
    torch.testing.assert_close(precise(result.model, TINY[name].example()), before, rtol=1e-9, atol=1e-9)
    assert all(set(result.kept[axis]).isdisjoint(units) for axis, units in dead.items())


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bert"])
def test_a_norm_rescaled_gives_what_it_gave(name):
    model = TINY[name].build(rms_norm_eps=1e-12) if name in ("llama", "gemma3") else TINY[name].build()
    norm = next(one for one in model.modules() if getattr(one, "weight", values(1)).shape == (24,))
    states, keep = values(4, 24), list(range(0, 24, 2))
    states[:, 1::2] = 0
    with torch.no_grad():
        norm.weight.copy_(values(24))
        before, weight = norm(states)[:, keep], norm.weight.clone()
        rescale_(norm, states.square().mean(0), keep)
        if name == "bert":
            assert torch.equal(norm.weight, weight)
            return
        norm.weight = nn.Parameter(norm.weight[keep])
        torch.testing.assert_close(norm(states[:, keep]), before, rtol=1e-3, atol=1e-4)


# Shapes


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "electra"])
def test_parameters_are_counted_as_they_will_be(name, tmp_path):
    state = state_of(TINY[name], tmp_path)
    space = space_of(state.model, state.layout)

    def counted(model):
        tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
        tables |= {id(one.weight) for one in [model.get_output_embeddings()] if one is not None}
        return sum(one.numel() for one in model.parameters() if id(one) not in tables)

    assert space.parameters(space.whole) == counted(state.model)
    sizes = {"hidden": 16 if space.per_head else 12, "columns": 17, **({} if name == "t5" else {"blocks": 2})}
    (result,) = Minitron(**sizes, recovery_steps=0).run(state)
    assert result.figures["parameters"] == counted(result.model)


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7])
def test_candidates_lie_near_the_budget_and_apart(share):
    model = TINY["qwen3"].build()
    space = space_of(model, layout_of(model))
    names = ("hidden", "columns", "heads", "blocks")
    found = space.candidates(share, names, 1, 5, lambda shape: shape["heads"] > 1)
    kept = np.array([space.parameters(shape) for shape in found]) / space.parameters(space.whole)
    assert len(found) == 5
    assert (np.abs(kept / share - 1) <= NEAR).all()
    assert len({tuple(shape.values()) for shape in found}) == 5
    assert all(shape["heads"] > 1 and 2 * shape["columns"] >= 0.8 * space.whole["columns"] for shape in found)
    shares = [[shape[name] / space.whole[name] for name in names] for shape in found]
    assert np.std(shares[0]) < min(np.std(one) for one in shares[1:])
    with pytest.raises(ReachError, match=r"no shape keeps 0.05 .* shrinking hidden"):
        space.candidates(0.05, ("hidden",), 8, 1, lambda shape: True)
    with pytest.raises(ReachError, match="transformers refuses every shape"):
        space.candidates(share, names, 1, 5, lambda shape: False)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("llama", {"hidden": 25}, "hidden is 24 in this model; expected 1 to that, met 25"),
        ("bert", {"hidden": 12}, "8 hidden channels for each head.* met hidden 12 with 1 heads"),
        ("bert", {"heads": 2}, "`heads` left out, met hidden 24 with 2 heads"),
        ("llama", {"hidden": 20}, "transformers refuses these sizes"),
        ("t5", {"blocks": 2}, "models of one stack"),
        ("whisper", {"hidden": 12}, "expected one number for all blocks"),
    ],
)
def test_sizes_that_cannot_be_are_told(name, sizes, message, tmp_path):
    with pytest.raises(LayoutError, match=message):
        list(Minitron(**sizes, recovery_steps=0).run(state_of(TINY[name], tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of parameters, speedup, or sizes .* met none"),
        ({"parameters": 0.5, "hidden": 12}, "met parameters and sizes"),
        ({"parameters": 0.5, "speedup": 2.0}, "met parameters and speedup"),
        ({"parameters": 0.5, "recovery_steps": 0}, "recovery_steps 0 can't rank shapes"),
        ({"parameters": 1.0}, "less than 1"),
    ],
)
def test_options_that_make_no_sense_are_told(options, message):
    with pytest.raises(ValidationError, match=message):
        Minitron(**options)


# The pass


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_the_best_after_recovery_comes_out(name, tmp_path):
    state = trainable(name, tmp_path)
    before = copy.deepcopy(state.model.state_dict())
    step = Minitron(parameters=0.5, candidates=2, recovery_steps=4, batch_size=8, learning_rate=0.003, alignment=1)
    (result,) = step.run(state)
    rows = result.figures["candidates"]
    assert len(rows) == 2
    assert all(row["loss_after"] < row["loss_before"] for row in rows)
    assert result.figures["loss_after"] == min(row["loss_after"] for row in rows)
    assert json.loads(json.dumps(result.figures)) == result.figures
    assert result.layout == layout_of(result.model)
    shape = result.figures["shape"]
    assert len(result.kept["hidden"]) == shape["hidden"] == result.model.config.hidden_size
    assert {axis: len(result.kept[axis]) for axis in result.layout.axes} == {
        axis.name: axis.units for axis in result.layout.axes.values()
    }
    assert all(torch.equal(one, state.model.state_dict()[key]) for key, one in before.items())


def test_kept_names_the_units_of_the_dense_model(tmp_path):
    state = state_of(TINY["bert"], tmp_path)
    for sizes in ({"columns": 20, "hidden": 16}, {"columns": 10, "hidden": 8}):
        (state,) = Minitron(**sizes, recovery_steps=0).run(state)
    dense = state.dense.model.state_dict()
    rows, channels = state.kept["encoder.layer.1.columns"], state.kept["hidden"]
    weight = state.model.state_dict()["encoder.layer.1.intermediate.dense.weight"]
    assert torch.equal(weight, dense["encoder.layer.1.intermediate.dense.weight"][rows][:, channels])


def test_a_speedup_is_what_the_target_measures(tmp_path, monkeypatch):
    Paper().install(monkeypatch)
    state = trainable("llama-tied", tmp_path)
    step = Minitron(speedup=1.2, axes=["columns", "heads"], candidates=2, recovery_steps=2, batch_size=16)
    (result,) = step.run(state)
    assert result.figures["speedup"] >= 1.2
    assert result.figures["promised"] == 1.2 <= result.figures["measured"]
    assert all(("loss_after" in row) == (row["speedup"] >= 1.2) for row in result.figures["candidates"])


def test_add_back_is_refused_where_queries_are_grouped(tmp_path):
    with pytest.raises(LayoutError, match="groups queries"):
        list(Minitron(heads=2, add_back=True, recovery_steps=0).run(state_of(TINY["llama"], tmp_path)))
    plain, mended = (
        next(Minitron(hidden=16, add_back=back, recovery_steps=0).run(state_of(TINY["gpt_neox"], tmp_path)))
        for back in (False, True)
    )
    assert plain.kept == mended.kept
    assert not torch.equal(*(answer(one.model, TINY["gpt_neox"].example()) for one in (plain, mended)))


def test_perplexity_is_for_language_models(tmp_path):
    with pytest.raises(TrainingError, match="needs text-generation, met feature-extraction"):
        list(Minitron(blocks=2, depth="perplexity", recovery_steps=0).run(state_of(TINY["bert"], tmp_path)))


STOCK = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not hasattr(model.config, "quantization_config")
    torch.save(model(torch.arange(3, 11)[None])[0].detach(), folder + "/answer.pt")
assert not any(name.partition(".")[0] in ("compress", "passes") for name in sys.modules)
"""


def test_stock_transformers_loads_it_in_a_process_of_its_own(tmp_path):
    ways = {"llama-tied": {"hidden": 12, "columns": 16, "blocks": 2}, "gemma3": {"blocks": 2}, "gpt2": {"hidden": 16}}
    found = {}
    for name, sizes in ways.items():
        (result,) = Minitron(**sizes, recovery_steps=0).run(state_of(TINY[name], tmp_path))
        checkpoint.save(result.model, tmp_path / name)
        with torch.no_grad():
            found[tmp_path / name] = result.model(torch.arange(3, 11)[None])[0]
    subprocess.run([sys.executable, "-c", STOCK, *map(str, found)], check=True, capture_output=True)
    for folder, mine in found.items():
        torch.testing.assert_close(torch.load(folder / "answer.pt"), mine)


# Distillation towards a wider teacher


def test_similarity_knows_no_width_and_no_scale():
    states = values(6, 12)
    assert similarity_distance(states, 3 * torch.cat([states, torch.zeros(6, 4)], 1)) < 1e-10
    assert similarity_distance(states, values(6, 8) + 1) > 1e-3
    assert similarity_distance(states[:1], states[1:2]) < 1e-10


@pytest.mark.parametrize(("name", "instead"), [("bert", "similarity"), ("llama-tied", "logits")])
def test_states_of_other_widths_are_not_compared(name, instead, tmp_path):
    (state,) = Minitron(hidden=16 if name == "bert" else 12, recovery_steps=0).run(trainable(name, tmp_path))
    with pytest.raises(TrainingError, match=f"of width .* expected a loss that needs no equal widths: {instead}"):
        Comparison(Losses(hidden=1.0), state)
    (map_,) = Comparison(Losses(hidden={"project": True, "last": 1}), state).beside["hidden"]
    assert map_.weight.nonzero()[:, 0].tolist() == state.kept["hidden"], "channels are put where they were"
    state = replace(state, workshop=replace(state.workshop, step=tmp_path / "distill"))
    (after,) = Distill(steps=2, batch_size=8).run(state)
    assert after.figures["losses"] == {instead: 1.0} == Losses(**{instead: 1}).model_dump(exclude_defaults=True)
