"""Statistics equal what one matrix of all tokens would give, and padding never counts."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from compress.errors import DataError
from compress.statistics import moments

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
MODELS = {
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**SIZES)),
        ["bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.1.output.dense"],
    ),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"],
    ),
}


def batch(seed, lengths=(5, 9, 3), pad=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask, "labels": torch.zeros(3).long()}


@pytest.fixture(params=MODELS)
def subject(request):
    torch.manual_seed(0)
    make, names = MODELS[request.param]
    return make(), names


def seen(model, name, batches):
    """All inputs (tokens, in) of a module, one text at a time and without padding."""
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][0].double()))
    model.eval()
    with torch.no_grad():
        for part in batches:
            for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True):
                model(ids[mask.bool()][None])
    handle.remove()
    return torch.cat(rows)


def test_equal_one_matrix_of_all_tokens(subject):
    model, names = subject
    batches = [batch(seed) for seed in range(3)]
    facts = moments(model, names, batches)
    assert set(facts) == {f"{name}.{what}" for name in names for what in ("gram", "mean", "count")}
    for name in names:
        rows = seen(model, name, batches)
        assert facts[f"{name}.count"] == len(rows) == 3 * 17
        torch.testing.assert_close(facts[f"{name}.gram"].double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(facts[f"{name}.mean"].double(), rows.mean(0), rtol=1e-4, atol=1e-6)


def test_a_view_stands_for_the_inputs(subject):
    model, names = subject
    plain, doubled = (moments(model, names, [batch(0)], view) for view in (None, lambda rows: 2 * rows))
    for name in names:
        torch.testing.assert_close(doubled[f"{name}.gram"], 4 * plain[f"{name}.gram"])
        torch.testing.assert_close(doubled[f"{name}.mean"], 2 * plain[f"{name}.mean"])


def test_padding_never_counts(subject):
    model, names = subject
    usual, strange = moments(model, names, [batch(0)]), moments(model, names, [batch(0, pad=49)])
    for key in usual:
        torch.testing.assert_close(usual[key], strange[key], msg=key)


def test_batching_changes_nothing(subject):
    model, names = subject
    whole = batch(0)
    parts = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(3)]
    one, many = moments(model, names, [whole]), moments(model, names, parts)
    for key in one:
        torch.testing.assert_close(one[key], many[key], rtol=1e-4, atol=1e-6, msg=key)


def test_leaves_the_model_as_it_was(subject):
    model, names = subject
    model.train()
    moments(model, names, [batch(0)])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_mask_every_token_counts(subject):
    model, names = subject
    part = {"input_ids": batch(0)["input_ids"]}
    assert moments(model, names, [part])[f"{names[0]}.count"] == 27


def test_no_text_is_said(subject):
    model, names = subject
    with pytest.raises(DataError, match=names[0]):
        moments(model, names, [])


def test_infinite_inputs_are_said(subject):
    model, names = subject
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        moments(model, names, [batch(0)])
