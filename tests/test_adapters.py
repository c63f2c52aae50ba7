"""Adapters: recovery of low rank, merged without a trace."""

import copy

import pytest
import torch
import transformers

from compress import checkpoint
from compress.errors import TrainingError
from passes.distillation.adapters import adapted
from passes.distillation.distill import Distill
from tests.conftest import TINY, answer, assert_one_model, precise
from tests.test_distill import distill, make_state, prune

RANK = 2


def moved(model, seed: int = 3) -> None:
    """Give every adapter something to say."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.3)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.inputs == "text"])
def test_merged_adapters_compute_what_they_did_and_leave_no_trace(name):
    tiny = TINY[name]
    model, example = tiny.build(), tiny.example()
    plain = copy.deepcopy(model)
    kinds = [type(module) for module in model.modules()]
    with adapted(model, RANK, 4.0, seed=0) as skipped:
        asked = {parameter for parameter, one in model.named_parameters() if one.requires_grad}
        assert asked
        assert all(parameter.endswith((".up", ".down")) for parameter in asked)
        torch.testing.assert_close(answer(model, example), answer(plain, example))
        moved(model)
        adapters = precise(model, example)
    torch.testing.assert_close(precise(model, example), adapters, rtol=1e-4, atol=1e-4)
    assert (adapters - precise(plain, example)).abs().max() > 1e-3
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    heads = [layer for layer, reason in skipped.items() if "head over the vocabulary" in reason]
    assert bool(heads) == (plain.get_output_embeddings() is not None)
    for parameter, weight in model.state_dict().items():
        change = weight - plain.state_dict()[parameter]
        if change.abs().max() > 0:
            assert weight.ndim == 2
            assert torch.linalg.matrix_rank(change, tol=1e-4) <= RANK


@pytest.mark.parametrize("task", ["text-classification", "text-generation", "feature-extraction"])
def test_recovery_by_adapters_alone_loads_as_ever(tmp_path, task):
    state = make_state(tmp_path, task)
    prune(state)
    before = copy.deepcopy(state.model.state_dict())
    after = distill(state, lora={"rank": RANK, "alpha": 8.0}, learning_rate=0.02)
    figures = after.figures
    assert figures["loss_after"] < 0.9 * figures["loss_before"]
    assert figures["trained_parameters"] < 0.5 * sum(one.numel() for one in after.model.parameters())
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, before[name]) or tensor.ndim == 2, name
    checkpoint.save(after.model, tmp_path / "saved", after.tokenizer)
    loaded = getattr(transformers, state.task.auto).from_pretrained(tmp_path / "saved").eval()
    batch = next(iter(state.data.batches("test", 4)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert_one_model(loaded, after.model.eval(), inputs)


def test_layers_that_share_a_matrix_go_without_and_are_named():
    model = TINY["bert"].build()
    first, second = model.encoder.layer[0].output.dense, model.encoder.layer[1].output.dense
    second.weight = first.weight
    weight = first.weight.detach().clone()
    with adapted(model, RANK, 4.0, seed=0) as skipped:
        moved(model)
    assert set(skipped) == {"encoder.layer.0.output.dense", "encoder.layer.1.output.dense"}
    assert torch.equal(first.weight, weight)
    with (
        pytest.raises(TrainingError, match="none of 0 layers can take an adapter"),
        adapted(torch.nn.LayerNorm(3), RANK, 4.0, seed=0),
    ):
        pass


def test_tables_and_adapters_exclude_one_another():
    with pytest.raises(ValueError, match="with lora no embedding table is trained"):
        Distill(lora={"rank": 2}, embeddings=True)
    assert Distill(lora={}).lora.rank == 16
