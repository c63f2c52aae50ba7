"""Slicing the residual stream: bases as numbers, models in other axes, and what is left when channels go."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress import checkpoint
from compress.errors import LayoutError
from compress.families import layout_of
from compress.record import record_of
from compress.runtimes import RUNTIMES, open_artifact
from compress.stream import width_of
from compress.target import Target
from passes.distillation.pairs import same_hidden_width
from passes.pruning.depth.fold import Fold
from passes.pruning.rotate.basis import basis, centre, even, kept_energy, of_length_one, summing_to_zero
from passes.pruning.rotate.slice_hidden import SliceHidden
from passes.pruning.rotate.stream import stream_of
from passes.pruning.rotate.turn import turned
from passes.pruning.uniform.minitron import Minitron
from tests.conftest import GENERATING, TINY, answer, assert_one_model, precise
from tests.paper import state_of
from tests.test_runtimes import assert_same

PRE_NORM = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "vit")
STOCK = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")  # families whose config tells the size of a head
HIDDEN = TINY["llama"].entries["hidden_size"]
EPSILON = {"llama": "rms_norm_eps", "qwen3": "rms_norm_eps", "gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def covariance(size=HIDDEN):
    rows = draw(5 * size, size) * torch.linspace(0.1, 3, size) + draw(size)
    return rows.T @ rows


def slice_(state, **options):
    (result,) = SliceHidden(**{"samples": 16, **options}).run(state)
    return result


def exact_state(name, folder):
    """A state whose model is in float64, and what it reads as well, so that new axes round nothing."""
    state = state_of(TINY[name], folder)
    state.model.double()
    texts = state.data.tensors
    texts |= {entry: value.double() for entry, value in texts.items() if value.is_floating_point()}
    return state


def stream(model, name):
    return stream_of(model, layout_of(model), TINY[name].example())


def rotated(model, name):
    """The model in other axes of the same width, such as norms take them."""
    found, layout = stream(model, name), layout_of(model)
    return turned(model, layout, found, basis(covariance(), HIDDEN, found.centred))


# Numbers


@pytest.mark.parametrize("centred", [False, True])
def test_what_is_lost_are_the_eigenvalues_left_out(centred):
    of_mean, width = torch.eye(HIDDEN, dtype=torch.float64) - 1 / HIDDEN, 10
    whole = of_mean @ covariance() @ of_mean if centred else covariance()
    seen = centre(covariance()) if centred else covariance()
    values = torch.linalg.eigvalsh(whole).flip(0)
    found = basis(seen, width, centred)
    lost = whole.trace() - (found.T @ whole @ found).trace()
    torch.testing.assert_close(lost, values[width - centred :].sum())
    assert kept_energy(seen, found) == pytest.approx(float(1 - lost / whole.trace()))
    other = torch.linalg.qr(draw(HIDDEN, width)).Q
    assert (other.T @ whole @ other).trace() < whole.trace() - lost


def test_coordinates_that_sum_to_zero_lose_nothing_but_the_mean():
    rows = draw(5, HIDDEN)
    for seen in (covariance(), rows.T @ rows):  # of rank 24 and 5
        found = basis(seen, HIDDEN, centred=True)
        assert (rows @ found).sum(1).abs().max() < 1e-12
        torch.testing.assert_close(rows @ found @ found.T, rows - rows.mean(1, keepdim=True))
    for width in (2, 7):
        zero = summing_to_zero(width)
        torch.testing.assert_close(zero.T @ zero, torch.eye(width - 1, dtype=torch.float64))
        assert zero.sum(0).abs().max() < 1e-12


def test_no_place_drowns_another_and_no_token_either():
    one, other = covariance(), torch.eye(HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(even([one, other]), even([1000 * one, other]))
    rows = draw(4, HIDDEN)
    for centred in (False, True):
        view = of_length_one(centred)
        torch.testing.assert_close(view(rows), view(rows * torch.tensor([[1.0], [9.0], [0.1], [1.0]])))
        torch.testing.assert_close(view(rows).norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(view(rows), view(rows + 5))


# The identity


@pytest.mark.parametrize("covariance", ["stream", "normalised"])
@pytest.mark.parametrize("name", PRE_NORM)
def test_a_model_of_which_nothing_goes_computes_what_it_did(name, covariance, tmp_path):
    state, inputs = exact_state(name, tmp_path), TINY[name].example()
    before, weights = state.model, copy.deepcopy(state.model.state_dict())
    expected = precise(before, inputs)
    result = slice_(state, hidden=HIDDEN, covariance=covariance)
    torch.testing.assert_close(precise(result.model, inputs), expected, rtol=1e-5, atol=1e-5)  # RMS norms are float32
    assert all(share == pytest.approx(1) for share in result.figures["energy_kept"].values())
    assert all(torch.equal(one, before.state_dict()[key]) for key, one in weights.items())
    changed = {key for key, one in result.model.state_dict().items() if key in weights and one.ndim > 1}
    changed = {key for key in changed if not torch.equal(result.model.state_dict()[key], weights[key])}
    assert len(changed) > 12, "axes that stay as they are would prove nothing"


@pytest.mark.parametrize("name", EPSILON)
def test_a_stream_in_a_subspace_is_sliced_to_it_without_loss(name, tmp_path):
    state = state_of(TINY[name], tmp_path)
    state.model = model = TINY[name].build(**{EPSILON[name]: 1e-12})
    inside = torch.linalg.qr(draw(HIDDEN, 11)).Q.float()
    with torch.no_grad():
        for parameter, dim in stream(model, name).writers.items():
            held = model.get_parameter(parameter)
            held.copy_((held.movedim(dim, -1) @ inside @ inside.T).movedim(-1, dim))
    expected = precise(model, TINY[name].example())
    result = slice_(state, hidden=12)
    torch.testing.assert_close(precise(result.model, TINY[name].example()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_the_axes_a_model_came_in_do_not_matter(name, tmp_path):
    one, other = state_of(TINY[name], tmp_path), state_of(TINY[name], tmp_path)
    other.model = rotated(other.model, name)
    results = [slice_(state, hidden=12).model for state in (one, other)]
    first, second = (precise(model, TINY[name].example()) for model in results)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert (first - answer(one.dense.model, TINY[name].example())).abs().max() > 1e-2


# What comes out


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_sliced_model_is_a_stock_one_where_a_config_can_tell_it(name, tmp_path):
    result = slice_(state_of(TINY[name], tmp_path), hidden=12)
    assert result.figures["stock"] == (name in STOCK) == (not hasattr(result.model.config, "quantization_config"))
    assert width_of(result.model.config) == 12
    assert not same_hidden_width(result)
    if name in STOCK:
        fresh = type(result.model)(type(result.model.config).from_dict(result.model.config.to_dict())).eval()
        fresh.load_state_dict(result.model.state_dict())
        inputs = TINY[name].example()
        assert_one_model(fresh, result.model, inputs)


def test_a_width_that_stock_refuses_has_a_record(tmp_path):
    result = slice_(state_of(TINY["llama"], tmp_path), hidden=17)
    assert record_of(result.model.config)["stream"] == 17
    assert not result.figures["stock"]


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_sliced_model_is_cut_like_any_other(name, tmp_path):
    model, inputs = slice_(state_of(TINY[name], tmp_path), hidden=13).model, TINY[name].example()
    layout, silenced = layout_of(model), copy.deepcopy(model)
    for index, (axis, one) in enumerate(layout.axes.items()):
        keep = [range(1, one.units), [0], []][index % 3]
        keep = keep if len(keep) >= one.least else [0]
        layout_of(silenced).silence(silenced, axis, [unit for unit in range(one.units) if unit not in keep])
        layout = layout.cut(model, axis, keep)
    torch.testing.assert_close(precise(model, inputs), precise(silenced, inputs), rtol=1e-9, atol=1e-9)
    checkpoint.save(model, tmp_path / "cut")
    loaded = type(model).from_pretrained(tmp_path / "cut").eval()
    assert_one_model(loaded, model, inputs)
    assert layout_of(loaded) == layout_of(model) == layout
    assert record_of(loaded.config) == record_of(model.config)
    for module in loaded.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    if name in GENERATING:
        ids, words = inputs["input_ids"][:1], {"max_new_tokens": 5, "do_sample": False}
        cached, fresh = (loaded.generate(ids, **words, use_cache=use) for use in (True, False))
        assert torch.equal(cached, fresh)


def test_onnx_equals_torch(tmp_path):
    model = slice_(state_of(TINY["gpt2"], tmp_path), hidden=13).model
    artifact = RUNTIMES["onnxruntime"].build(model, TINY["gpt2"].example(2, 9), tmp_path / "onnx")
    assert_same(open_artifact(artifact, Target()), model, TINY["gpt2"].example(3, 14))


def test_blocks_of_a_sliced_model_are_dropped_and_folded(tmp_path):
    state = state_of(TINY["gpt2"], tmp_path)
    state.model = TINY["gpt2"].build(n_layer=5)
    state.layout = layout_of(state.model)
    state = slice_(state, hidden=13)
    state.drop("transformer.h", [0, 1, 3, 4])
    (state,) = Fold(samples=4, cure=0).run(state)
    checkpoint.save(state.model, tmp_path / "model")
    loaded = type(state.model).from_pretrained(tmp_path / "model").eval()
    assert record_of(loaded.config)["shared"]
    assert_one_model(loaded, state.model, TINY["gpt2"].example())


# Sizes


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"share": 0.3}, 16),
        ({"share": 0.3, "alignment": 6}, 12),
        ({"share": 0.01}, 23),
        ({"hidden": 7}, 7),
    ],
)
def test_the_width_is_the_widest_that_was_asked_for(options, width, tmp_path):
    result = slice_(state_of(TINY["llama-tied"], tmp_path), **options)
    assert result.figures["width"] == {"before": HIDDEN, "after": width}
    assert width_of(result.model.config) == width
    assert json.loads(json.dumps(result.figures)) == result.figures
    counts = result.figures["parameters"]
    assert counts == {"before": result.dense.model.num_parameters(), "after": result.model.num_parameters()}
    assert bool(result.figures["warnings"]) == (counts["after"] > counts["before"]) == (width > 20)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_share_of_the_parameters_is_met_by_the_widest(name, tmp_path):
    def counted(model):
        tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
        return sum(one.numel() for one in model.parameters() if id(one) not in tables | {id(model.lm_head.weight)})

    result = slice_(state_of(TINY[name], tmp_path), parameters=0.7)
    width, most = result.figures["width"]["after"], 0.7 * counted(result.dense.model)
    wider = slice_(state_of(TINY[name], tmp_path), hidden=width + 1)
    assert counted(result.model) <= most < counted(wider.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing says how much; expected share, hidden or parameters"),
        ({"share": 0.5, "hidden": 12}, "share and hidden says how much"),
        ({"hidden": 12, "alignment": 8}, "hidden: 12 is the width itself; expected no alignment"),
        ({"share": 1.0}, "less than 1"),
    ],
)
def test_options_that_make_no_sense_are_told(options, message):
    with pytest.raises(ValidationError, match=message):
        SliceHidden(**options)


# Refusals


def test_a_width_that_cannot_be_is_told(tmp_path):
    with pytest.raises(LayoutError, match="hidden is 24 in this model; expected 2 to that, met 25"):
        slice_(state_of(TINY["llama"], tmp_path), hidden=25)


def test_states_that_are_the_output_of_a_model_are_not_turned():
    tiny = TINY["gpt2"]
    model = type(tiny)("AutoModel", tiny.kind, tiny.entries).build()
    with pytest.raises(LayoutError, match=r"no linear layer reads 'ln_f'"):
        stream_of(model, layout_of(model), tiny.example())


def test_what_went_another_way_before_is_refused(tmp_path):
    state = slice_(state_of(TINY["gpt2"], tmp_path), hidden=13)
    for step in (SliceHidden(share=0.3), Minitron(hidden=8, recovery_steps=0)):
        with pytest.raises(LayoutError, match="the stream of this model was sliced to 13; expected one that is whole"):
            list(step.run(state))
    state = state_of(TINY["llama"], tmp_path)
    state.cut("model.layers.1.columns", range(20))
    with pytest.raises(LayoutError, match="widths of its own in some blocks"):
        slice_(state, hidden=12)
    state = state_of(TINY["llama"], tmp_path)
    state.model = TINY["llama"].build(num_hidden_layers=4)
    state.layout = layout_of(state.model)
    (state,) = Fold(samples=4, cure=0).run(state)
    with pytest.raises(LayoutError, match="met shared blocks; expected this step before fold"):
        slice_(state, hidden=12)
