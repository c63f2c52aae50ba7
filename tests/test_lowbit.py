"""Lowbit: codes are the papers', what is stored computes what was trained, and training gains."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compress import checkpoint
from compress.contract import Part
from compress.errors import LayoutError
from compress.families import layout_of
from compress.lowbit import (
    CodedLinear,
    StoredLinear,
    lowbit_,
    packed,
    product,
    store_,
    svid,
    ternary,
    unpacked,
)
from compress.runtimes import RUNTIMES, open_artifact
from compress.target import Target
from passes.distillation.compare import Comparison
from passes.quantization.lowbit import Lowbit
from tests.card import Card
from tests.conftest import TINY, assert_one_model
from tests.paper import state_of
from tests.test_distill import make_state
from tests.world import power_cut

METHODS = ("ternary", "onebit")
REFUSED = {"gpt2": "has no Linear in its blocks", "t5": "looks into its layers", "t5-gated": "looks into its layers"}
FAMILIES = tuple(name for name in TINY if name not in REFUSED)
SHORT = {"batch_size": 16, "learning_rate": 0.003, "precision": "float32"}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Numbers.


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 65, 288])
def test_packed_codes_are_read_back(count: int) -> None:
    codes = draw(count, 11, count).round().clamp(-1, 1) + 0.0
    planes = packed(codes, "ternary")
    assert planes.shape == (2, 11, math.ceil(count / 8))
    assert torch.equal(unpacked(planes, count), codes)
    signs = torch.where(codes >= 0, 1.0, -1.0)
    assert packed(signs, "onebit").shape == (1, 11, math.ceil(count / 8))
    assert torch.equal(unpacked(packed(signs, "onebit"), count), signs)


def test_ternary_codes_are_the_nearest_in_steps_of_the_mean_magnitude() -> None:
    weight = draw(1, 5, 40)
    weight[2] = 0
    weight.requires_grad_()
    codes, scale = ternary(weight)
    torch.testing.assert_close(scale[:2], weight.detach()[:2].abs().mean(1))
    steps = weight.detach() / scale[:, None]
    expected = torch.where(steps.abs() > 0.5, steps.sign(), 0)
    assert torch.equal(codes.detach(), expected)
    assert (codes[2] == 0).all()
    (codes * scale[:, None]).sum().backward()
    assert torch.allclose(weight.grad, torch.ones_like(weight))


def test_the_factored_product_is_that_of_signs_times_a_matrix_of_rank_one() -> None:
    weight, x, bias = draw(2, 12, 30), draw(3, 4, 30), draw(4, 12)
    outer, inner = svid(weight)
    dense = weight.sign() * torch.outer(outer, inner)
    torch.testing.assert_close(product(x, weight.sign(), outer, inner, bias), x @ dense.T + bias)


def test_the_vectors_are_the_best_of_rank_one_and_no_sign_could_do_better() -> None:
    weight = draw(5, 12, 30)
    outer, inner = svid(weight)
    assert (outer >= 0).all()
    assert (inner >= 0).all()
    torch.testing.assert_close(outer.norm(), inner.norm())
    left, values, right = torch.linalg.svd(weight.abs())
    torch.testing.assert_close(torch.outer(outer, inner), values[0] * torch.outer(left[:, 0], right[0]))
    error = (weight - weight.sign() * torch.outer(outer, inner)).square().sum()
    torch.testing.assert_close(error, values[1:].square().sum())
    assert error < (weight - weight.sign() * weight.abs().mean(1, keepdim=True)).square().sum()


# Models.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_stored_model_computes_what_was_trained_bit_for_bit(name: str, method: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.example()
    layout = layout_of(model)
    layout = layout.cut(model, next(axis for axis in layout.axes if axis.endswith("1.columns")), range(7))
    assert lowbit_(model, layout, method) == {}
    model(**inputs)[0].square().mean().backward()
    coded = {layer: one for layer, one in model.named_modules() if isinstance(one, CodedLinear)}
    assert len(coded) >= 2 * sum(stack.length for stack in layout.stacks.values())
    for layer in coded.values():
        assert all(part.grad is not None for part in layer.parameters())
    with torch.no_grad():
        expected = model(**inputs)[0]
        store_(model)
        assert torch.equal(model(**inputs)[0], expected)
    checkpoint.save(model, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    assert_one_model(loaded, model, inputs)
    assert layout_of(loaded) == layout
    stored = [one for one in loaded.modules() if isinstance(one, StoredLinear)]
    assert len(stored) == len(coded)
    planes = 2 if method == "ternary" else 1
    assert all(
        one.bits.dtype == torch.uint8 and one.bits.shape == (planes, one.out_features, -(-one.in_features // 8))
        for one in stored
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_writes_with_its_cache_what_it_writes_without(method: str) -> None:
    model = TINY["llama"].build()
    lowbit_(model, layout_of(model), method)
    store_(model)
    words = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    inputs = {name: value[:1] for name, value in TINY["llama"].example().items()}
    cached, uncached = (model.generate(**inputs, **words, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_signs_of_sixteen_bit_models_are_read_as_bits(method: str, kind: torch.dtype, monkeypatch) -> None:
    floats = []
    monkeypatch.setattr("compress.lowbit.unpacked", lambda bits, count: torch.empty(bits.shape[1], count))
    monkeypatch.setattr("compress.lowbit.product", lambda x, *_: floats.append(x))
    with FakeTensorMode(), torch.device("cuda"):
        layer = StoredLinear(40, 6, None, method)
        outer, inner = (nn.Parameter(torch.empty(width, dtype=kind), requires_grad=False) for width in (6, 40))
        layer.outer, layer.inner = outer, inner if method == "onebit" else None
        x = torch.empty(2, 3, 40, dtype=kind)
        with Card() as card:
            met = layer(x)
            if (method, kind) == ("onebit", torch.bfloat16):
                assert (met.shape, met.dtype, met.device.type) == ((2, 3, 6), kind, "cuda")
                assert (card.asked, floats) == (["signs_linear"], [])
                layer(x.requires_grad_())  # the kernel has no gradient
            assert (len(card.asked), len(floats)) == (int(met is not None), 1)


@pytest.mark.parametrize("method", METHODS)
def test_an_onnx_graph_computes_the_same(method: str, tmp_path: Path) -> None:
    model = TINY["llama"].build(num_hidden_layers=1)
    lowbit_(model, layout_of(model), method)
    store_(model)
    inputs = TINY["llama"].example(3, 7)
    RUNTIMES["onnxruntime"].build(model, TINY["llama"].example(), tmp_path)
    met = open_artifact(tmp_path, Target())(inputs)["logits"]
    mask = inputs["attention_mask"].numpy().astype(bool)
    with torch.no_grad():
        np.testing.assert_allclose(met[mask], model(**inputs).logits.numpy()[mask], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "said"), REFUSED.items())
def test_what_cannot_be_of_few_bits_is_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=said):
        list(Lowbit(steps=1).run(state_of(TINY[name], tmp_path)))


def test_a_model_of_few_bits_is_not_made_so_again() -> None:
    model = TINY["llama"].build()
    lowbit_(model, layout_of(model), "onebit")
    with pytest.raises(LayoutError, match="is lowbit already"):
        lowbit_(model, layout_of(model), "ternary")


# The pass.


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_tells_what_is_stored(task: str, method: str, tmp_path: Path) -> None:
    state = make_state(tmp_path, task)
    dense = copy.deepcopy(state.dense.model.state_dict())
    (after,) = Lowbit(method=method, steps=40, **SHORT).run(state)
    figures = after.figures
    assert figures["loss_after"] < 0.8 * figures["loss_before"]
    assert all(torch.equal(dense[name], tensor) for name, tensor in after.dense.model.state_dict().items())
    table = after.model.get_input_embeddings().weight
    assert torch.equal(table, after.dense.model.get_input_embeddings().weight)
    checkpoint.save(after.model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    sizes = figures["stored_bytes"]
    assert sizes["after"] == sum(one.numel() * one.element_size() for one in stored.values()) < sizes["before"]
    assert not any(isinstance(module, CodedLinear) for module in after.model.modules())
    assert Lowbit().touches == Part.VALUES | Part.FORMAT


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_same_bits(method: str, tmp_path: Path) -> None:
    def run(folder: str) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        state = make_state(tmp_path / folder, "text-generation")
        (after,) = Lowbit(method=method, steps=8, checkpoint_every=3, **SHORT).run(state)
        return after.model.state_dict()

    straight = run("straight")
    with power_cut(Comparison, "losses", 6):
        run("killed")
    resumed = run("killed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(one, resumed[name]) for name, one in straight.items())
