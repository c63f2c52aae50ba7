"""Binarize: counted bits are sums of signs, gradients pass, and what is stored computes what was trained."""

from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from compress import checkpoint
from compress.binary import BinaryAttention, BinaryLinear, PackedLinear, binarize_, pack_
from compress.bits import pack, seen_product, signs_product, unpack
from compress.codes import Elastic, Signs, binary, fitting, signs
from compress.contract import Part
from compress.errors import LayoutError, PlanError
from compress.families import layout_of
from compress.plan import Plan, Tables
from compress.record import record_of
from compress.runtimes import RUNTIMES, open_artifact
from compress.target import Target
from exporters import EXPORTERS
from passes import PASSES
from passes.distillation.compare import Comparison
from passes.quantization.binarize import Binarize
from tests.card import Card
from tests.conftest import TINY
from tests.paper import state_of
from tests.test_distill import make_state
from tests.world import make_world, power_cut

ENCODERS = ("bert", "bert-classifier", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
METHODS = ("bibert", "bit")
SHORT = {"batch_size": 16, "learning_rate": 0.003, "precision": "float32"}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Bits.


@pytest.mark.parametrize("count", [*range(1, 20), 63, 64, 65, 127, 128, 129, 384, 1000])
def test_products_of_bits_are_products_of_what_they_say(count: int) -> None:
    a, b = signs(draw(count, 5, count)), signs(draw(count + 1, 7, count))
    seen = (draw(count + 2, 5, count) > 0).float()
    assert torch.equal(unpack(pack(a), count), a)
    assert pack(a).shape == (5, math.ceil(count / 8))
    assert torch.equal(signs_product(pack(a), pack(b), count), a @ b.T)
    assert torch.equal(seen_product(pack(seen), pack(b)), seen @ b.T)


def test_products_of_many_rows_and_of_stacks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = signs(draw(1, 2, 3, 9, 70)), signs(draw(2, 2, 3, 11, 70))
    assert torch.equal(signs_product(pack(a), pack(b), 70), a @ b.mT)
    monkeypatch.setattr("compress.bits.AT_ONCE", 12)
    assert torch.equal(signs_product(pack(a[0, 0]), pack(b[0, 0]), 70), a[0, 0] @ b[0, 0].T)


def test_zero_counts_as_positive_and_gradients_pass_within_one() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    found = signs(values)
    assert found.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    found.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_the_mean_magnitude_is_the_best_scale() -> None:
    rows = draw(3, 6, 50)
    sign, scale = binary(rows)
    centred = rows - rows.mean(1, keepdim=True)
    best = (centred - sign * scale[:, None]).square().sum(1)
    for other in (0.9, 1.1):
        assert (best < (centred - other * sign * scale[:, None]).square().sum(1)).all()


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_elastic_codes_are_whole_and_their_gradients_those_of_lsq(bits: int, unsigned: bool) -> None:
    one = Elastic((50,), unsigned)
    one.bits = bits
    values = (draw(bits, 20, 50).abs() if unsigned else draw(bits, 20, 50)).requires_grad_()
    one.fit_(values.detach())
    codes, step = one(values)
    low, high = one.range
    assert set(codes.unique().tolist()) <= set(range(low, high + 1)) - ({0} if (low, high) == (-1, 1) else set())
    if bits == 4:
        assert (values - step * codes).abs().mean() < 0.5 * values.abs().mean()
    assert torch.equal(one(values.detach())[0], codes)
    (codes * step).sum().backward()
    ratio = (values / one.step).detach()
    inside = (ratio >= low) & (ratio <= high)
    assert torch.equal(values.grad != 0, inside)
    expected = (codes.detach() - torch.where(inside, ratio, 0)).sum() * (values.numel() * high) ** -0.5
    torch.testing.assert_close(one.step.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.shift.grad, -inside.float().sum(0))


# Models.


@pytest.fixture(params=[(name, method) for name in ENCODERS for method in METHODS], ids="-".join)
def trained(request):
    """A tiny encoder, cut a little, with binary modules that can be trained, and its inputs."""
    name, method = request.param
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.example()
    layout = layout_of(model)
    layout = layout.cut(model, next(axis for axis in layout.axes if axis.endswith("0.heads")), [0, 2])
    layout = layout.cut(model, next(axis for axis in layout.axes if axis.endswith("1.columns")), range(7))
    binarize_(model, layout, method, embeddings=name != "roberta")  # whose head has the table's matrix
    with torch.no_grad(), fitting(model):
        model(**inputs)
    return model, layout, inputs


def test_a_stored_model_computes_what_was_trained_bit_for_bit(trained, tmp_path) -> None:
    model, layout, inputs = trained
    model(**inputs)[0].square().mean().backward()
    lacking = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.abs().max()]
    assert [name for name in lacking if "pooler" not in name and "binary" not in name] == []
    with torch.no_grad():
        expected = model(**inputs)[0]
        pack_(model)
        assert torch.equal(model(**inputs)[0], expected)
        checkpoint.save(model, tmp_path / "saved")
        loaded = type(model).from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(loaded(**inputs)[0], expected)
        alone = {name: value[:1] for name, value in inputs.items()}
        torch.testing.assert_close(loaded(**alone)[0], expected[:1])
    assert layout_of(loaded) == layout
    packed = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 3 * 6
    assert all(one.bits.dtype == torch.uint8 and one.bits.shape[1] == -(-one.in_features // 8) for one in packed)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_of_more_bits_are_counted_in_planes_to_the_same_bits(bits: int, tmp_path) -> None:
    model, inputs = TINY["bert"].build(), TINY["bert"].example()
    binarize_(model, layout_of(model), "bit", embeddings=True, bits=bits)
    with torch.no_grad(), fitting(model):
        model(**inputs)
    with torch.no_grad():
        expected = model(**inputs)[0]
        one = model.get_submodule("encoder.layer.0.intermediate.dense")
        codes, _ = one.read(draw(bits, 3, one.in_features))
        assert len(codes.unique()) > 2
        pack_(model)
        assert torch.equal(model(**inputs)[0], expected)
        checkpoint.save(model, tmp_path / "saved")
        assert torch.equal(type(model).from_pretrained(tmp_path / "saved").eval()(**inputs)[0], expected)


def test_on_a_gpu_kernels_count_the_bits_of_layers_and_attention(trained, card) -> None:
    model, _, inputs = trained
    with torch.no_grad():
        expected = model(**inputs)[0]
        pack_(model)
        with card:
            assert torch.equal(model(**inputs)[0], expected)
    attentions = sum(isinstance(module, BinaryAttention) for module in model.modules())
    seen = sum(isinstance(module, PackedLinear) and module.read.range == (0, 1) for module in model.modules())
    assert Counter(card.asked) == {"signs_product": 3 * 6 - seen + attentions, "seen_product": seen + attentions}


def test_on_a_gpu_no_float_is_made_of_a_bit() -> None:
    with FakeTensorMode(), torch.device("cuda"), Card() as card:
        layer = PackedLinear(40, 6, None, Signs())
        met = layer(torch.empty(2, 3, 40))
    assert (met.shape, met.device.type, card.asked) == ((2, 3, 6), "cuda", ["signs_product"])


def test_a_compiled_layer_counts_bits_without_a_break() -> None:
    layer, x = PackedLinear(40, 6, None, Signs()), draw(1, 2, 3, 40)
    layer.bits.data, layer.scale.data = pack(draw(2, 6, 40)), draw(3, 6).abs()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_padding_is_not_seen(trained) -> None:
    model, _, inputs = trained
    mask = inputs["attention_mask"].bool()
    changed = {**inputs, "input_ids": inputs["input_ids"].masked_fill(~mask, 17)}
    with torch.no_grad():
        one, other = model(**inputs)[0], model(**changed)[0]
    places = mask if one.shape[:2] == mask.shape else slice(None)
    assert torch.equal(one[places], other[places])


@pytest.mark.parametrize("method", METHODS)
def test_an_onnx_graph_computes_the_same(method: str, tmp_path) -> None:
    model = TINY["bert"].build()
    binarize_(model, layout_of(model), method, embeddings=True)
    pack_(model)
    with torch.no_grad():
        RUNTIMES["onnxruntime"].build(model, TINY["bert"].example(), tmp_path)
        inputs = TINY["bert"].example(3, 7)
        met = open_artifact(tmp_path, Target())(inputs)["last_hidden_state"]
        np.testing.assert_allclose(met, model(**inputs)[0].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", "writes text"),
        ("whisper", "writes text"),
        ("t5", "computes its attention by itself"),
        ("mpnet", "computes its attention by itself"),
    ],
)
def test_what_cannot_be_binary_is_refused(name: str, said: str, tmp_path) -> None:
    with pytest.raises(LayoutError, match=said):
        list(Binarize(steps=1).run(state_of(TINY[name], tmp_path)))
    model = TINY["bert"].build()
    binarize_(model, layout_of(model), "bit", embeddings=True)
    with pytest.raises(LayoutError, match="is binary already"):
        binarize_(model, layout_of(model), "bit", embeddings=True)


# The pass.


@pytest.mark.parametrize("task", ["text-classification", "fill-mask", "feature-extraction"])
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_tells_what_it_counted(task: str, method: str, tmp_path) -> None:
    state = make_state(tmp_path, task)
    dense = copy.deepcopy(state.dense.model.state_dict())
    (after,) = Binarize(method=method, steps=40, **SHORT).run(state)
    figures = after.figures
    stages = figures["stages"]
    assert [stage["bits"] for stage in stages] == ([4, 2, 1] if method == "bit" else [1])
    assert all(stage["loss_after"] < stage["loss_before"] for stage in stages)
    assert ("directions" in stages[0]["losses"]) == (method == "bibert")
    assert all(torch.equal(dense[name], tensor) for name, tensor in after.dense.model.state_dict().items())
    checkpoint.save(after.model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert figures["stored_bytes"]["after"] == sum(one.numel() * one.element_size() for one in stored.values())
    assert figures["stored_bytes"]["after"] < figures["stored_bytes"]["before"]
    tokens, width, feed = 64, 16, 32  # as many tokens as the model takes
    products = 3 * 2 * tokens * (4 * width**2 + 2 * width * feed + 2 * tokens * width)
    assert figures["bit_operations"] == products
    assert figures["float_operations"]["before"] - figures["float_operations"]["after"] == products
    assert figures["skipped"] == ({"embeddings": "the head has the same matrix"} if task == "fill-mask" else {})
    assert not any(isinstance(module, BinaryLinear) for module in after.model.modules())


def test_activations_may_keep_the_bits_of_the_last_stage(tmp_path) -> None:
    (after,) = Binarize(stages=(8, 4), steps=20, **SHORT).run(make_state(tmp_path, "text-classification"))
    figures = after.figures
    assert [stage["bits"] for stage in figures["stages"]] == [8, 4]
    counted = figures["float_operations"]["before"] - figures["float_operations"]["after"]
    assert figures["bit_operations"] == 4 * counted > 0
    assert record_of(after.model.config)["binary"]["bits"] == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_same_bits(method: str, tmp_path) -> None:
    def run(folder: str):
        (tmp_path / folder).mkdir(exist_ok=True)
        state = make_state(tmp_path / folder, "text-classification")
        (after,) = Binarize(method=method, steps=8, checkpoint_every=3, **SHORT).run(state)
        return after.model.state_dict()

    straight = run("straight")
    with power_cut(Comparison, "losses", 20 if method == "bit" else 6):
        run("killed")
    resumed = run("killed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(one, resumed[name]) for name, one in straight.items())


def test_a_plan_knows_that_nothing_may_follow_and_stages_go_down(tmp_path) -> None:
    make_world(tmp_path)
    head = {"model": str(tmp_path / "my-encoder"), "data": {"source": str(tmp_path / "reviews.txt")}}

    def problems(*passes: object) -> list[str]:
        return Plan.read({**head, "passes": list(passes), "export": ["huggingface"]}, Tables(PASSES, EXPORTERS)).check()

    assert problems({"binarize": {"method": "bibert"}}) == []
    assert any("has fixed the number format" in problem for problem in problems("binarize", "distill"))
    assert Binarize().touches == Part.VALUES | Part.FORMAT
    for wrong in ({"stages": [2, 4, 1]}, {"stages": []}, {"stages": [1], "method": "bibert"}):
        with pytest.raises(PlanError, match="stages"):
            Plan.read({**head, "passes": [{"binarize": wrong}]}, Tables(PASSES, EXPORTERS))
