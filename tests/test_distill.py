"""Distill and Finetune: a student finds back to its teacher, and a fine-tuned model is the teacher of what follows."""

import copy
import json
import math
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from compress.data import Data, DataOptions
from compress.errors import CompressError, TrainingError
from compress.families import layout_of
from compress.state import State, Teacher, Workshop
from compress.target import Target
from compress.tasks import TASKS
from passes.distillation import distill as module
from passes.distillation.choice import Losses
from passes.distillation.classifier import classifier_of, features, read_by
from passes.distillation.compare import HEAD, Comparison
from passes.distillation.distill import Distill
from passes.distillation.finetune import Finetune
from passes.distillation.losses import LOSSES
from passes.distillation.monitor import hacked, label_loss
from passes.distillation.pairs import places
from tests.world import power_cut

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"word{number}" for number in range(40))
SIZES = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
GENERAL = [name for name, cls in LOSSES.items() if not cls.tasks or "text-generation" in cls.tasks]
LABELLED = ("text-classification", "token-classification", "question-answering")


def make_tokenizer():
    base = Tokenizer(models.WordLevel({word: number for number, word in enumerate((*SPECIAL, *WORDS))}, "[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    base.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=base, model_max_length=64, **names)


def row_for(task: str, number: int) -> dict:
    """A row whose label can be read off its words."""
    draw = random.Random(number)
    words = [draw.choice(WORDS) for _ in range(draw.randint(4, 14))]
    if task == "token-classification":
        return {"tokens": words, "tags": ["HIGH" if int(word[4:]) >= 20 else "O" for word in words]}
    if task == "question-answering":
        context = " ".join(words)
        answer = {"text": [words[2]], "answer_start": [context.index(words[2])]}
        return {"question": f"{words[2]} {number % 7}", "context": context, "answers": answer}
    return {"text": " ".join(words), "label": "high" if int(words[0][4:]) >= 20 else "low"}


def make_state(folder, task_name: str, rows: int = 160, **config) -> State:
    task, tokenizer = TASKS[task_name], make_tokenizer()
    source = folder / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row_for(task_name, number)) for number in range(rows)))
    label = {"label": "label"} if task_name == "text-classification" else {}
    data = Data.open(DataOptions(source=str(source), max_length=32, **label), tokenizer, task)
    kind = transformers.LlamaConfig if task_name == "text-generation" else transformers.BertConfig
    labels = {"num_labels": len(data.labels)} if data.labels else {}
    torch.manual_seed(0)
    model = getattr(transformers, task.auto).from_config(kind(**{**SIZES, **labels, **config}))
    with torch.no_grad():
        for parameter in model.parameters():  # the weights of fresh models are so faint that pruning costs nothing
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    workshop = Workshop(step=folder / "step", run=folder / "run")
    state = State(model, tokenizer, layout_of(model), task, Target(), workshop, Teacher(None, task), data)
    state.becomes_dense()
    return state


def prune(state: State, heads: int = 1) -> None:
    """Leave the model with half of its columns and so many heads, of two."""
    for name, axis in list(state.layout.axes.items()):
        state.cut(name, range(axis.units // 2) if axis.kind == "columns" else range(heads))


def distill(state: State, **options) -> State:
    given = {"steps": 40, "batch_size": 16, "learning_rate": 0.005, "precision": "float32", **options}
    (after,) = Distill(**given).run(state)
    return after


@pytest.mark.parametrize("task", TASKS)
def test_recovery_brings_a_pruned_model_nearer_to_its_teacher(tmp_path, task):
    state = make_state(tmp_path, task)
    prune(state)
    dense = copy.deepcopy(state.dense.model.state_dict())
    after = distill(state)
    figures = json.loads(json.dumps(after.figures))
    assert figures["loss_after"] < 0.8 * figures["loss_before"]
    assert figures["steps"] == 40
    assert figures["best_step"] > 0
    assert set(figures["losses"]) <= set(figures["history"][-1])
    assert all(torch.equal(dense[name], tensor) for name, tensor in after.dense.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in after.model.parameters())


@pytest.mark.parametrize("embeddings", [False, True])
def test_tables_are_trained_on_demand_alone(tmp_path, embeddings):
    state = make_state(tmp_path, "text-classification")
    prune(state)
    before = state.model.get_input_embeddings().weight.clone()
    after = distill(state, embeddings=embeddings).model
    assert torch.equal(after.get_input_embeddings().weight, before) != embeddings


@pytest.mark.parametrize("task", TASKS)
def test_a_twin_is_left_as_it_is(tmp_path, task):
    state = make_state(tmp_path, task)
    before = copy.deepcopy(state.model.state_dict())
    after = distill(state, steps=3, losses=without_task(task))
    assert after.figures["loss_before"] == pytest.approx(0, abs=1e-6)
    assert after.figures["loss_after"] <= after.figures["loss_before"]
    for name, tensor in after.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0.05, atol=0.02)


def without_task(task: str) -> dict[str, float]:
    return dict(Losses.fitting(TASKS[task], labelled=False))


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone_recovers(tmp_path, name):
    state = make_state(tmp_path, "text-generation" if LOSSES[name].across else "text-classification")
    prune(state, heads=1 + getattr(LOSSES[name], "head_by_head", False))
    after = distill(state, losses={name: 1.0})
    assert after.figures["loss_after"] < after.figures["loss_before"]
    heads = {"labels"} if LOSSES[name].reads & HEAD else set()
    assert set(after.figures["history"][-1]) == {"step", "loss", "validation", name} | heads


LEARNING = {
    "hidden": {"project": True},
    "taid": {"weight": 2, "rise": 0.1},
    "leaf": {"project": True},
    "dac_kl": {"weight": 1},
    "lelp": {"subclasses": 4},
}


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": True},
        {"losses": LEARNING, "average": 0.9, "recompute": True, "embeddings": True},
        {"lora": {"rank": 2}, "losses": LEARNING, "average": 0.9},
    ],
)
def test_a_killed_recovery_resumes_to_the_same_bits(tmp_path, options):
    def pruned(folder):
        folder.mkdir(exist_ok=True)
        state = make_state(folder, "text-classification")
        prune(state)
        return state

    straight = distill(pruned(tmp_path / "straight"), checkpoint_every=4, **options)
    with power_cut(Comparison, "losses", 20):
        distill(pruned(tmp_path / "killed"), checkpoint_every=4, **options)
    resumed = distill(pruned(tmp_path / "killed"), checkpoint_every=4, **options)
    assert all(torch.equal(one, resumed.model.state_dict()[name]) for name, one in straight.model.state_dict().items())
    assert straight.figures["history"] == resumed.figures["history"]


def test_gradients_reach_the_student_and_what_is_beside_it_alone(tmp_path):
    state = make_state(tmp_path, "text-generation")
    prune(state, heads=2)
    losses = {name: {"project": True} if "project" in LOSSES[name].model_fields else 1.0 for name in GENERAL}
    compare = Comparison(Losses(**losses), state)
    compare.teacher.requires_grad_(True)
    batch = next(iter(state.data.batches("train", 8)))
    found = compare.losses(compare.student, batch)
    assert list(found) == GENERAL
    for name, loss in found.items():
        loss.backward(retain_graph=True)
        reached = [one.grad for one in compare.student.parameters() if one.grad is not None]
        assert max(float(one.abs().max()) for one in reached) > 0, name
        compare.student.zero_grad()
    assert all(one.grad is None for one in compare.teacher.parameters())
    assert all(one.grad.abs().max() > 0 for one in compare.beside.parameters())
    assert set(compare.beside) == {
        "taid",
        "dac_kl",
        *(name for name, cls in LOSSES.items() if "project" in cls.model_fields),
    }


def test_losses_stay_float32_where_the_models_run_in_bfloat16(tmp_path):
    state = make_state(tmp_path, "text-generation")
    prune(state, heads=2)
    compare = Comparison(Losses(**dict.fromkeys(set(GENERAL) - {"task"}, 1.0)), state)
    batch = next(iter(state.data.batches("train", 8)))
    with torch.autocast("cpu", torch.bfloat16):
        found = compare.losses(compare.student, batch)
    assert {loss.dtype for loss in found.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in found.values())


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification", "text-generation"])
def test_a_narrower_student_learns_by_maps_that_are_thrown_away(tmp_path, task):
    state = make_state(tmp_path, task)
    narrow = copy.deepcopy(state.model.config)
    narrow.hidden_size, narrow.intermediate_size = 8, 16
    state.model = getattr(transformers, state.task.auto).from_config(narrow)
    state.layout = layout_of(state.model)
    names = set(state.model.state_dict())
    after = distill(state, losses={"cosine": {"project": True, "last": 2}, "leaf": {"project": True}, "relations": 1})
    history = after.figures["history"]
    assert all(history[-1][name] < 0.9 * history[1][name] for name in ("cosine", "leaf"))
    assert set(after.model.state_dict()) == names
    assert after.figures["losses"] == {
        "cosine": {"last": 2, "project": True},
        "leaf": {"project": True},
        "relations": 1.0,
    }


def test_a_reference_tells_which_rows_have_most_to_gain(tmp_path):
    state = make_state(tmp_path, "token-classification")
    dense = tmp_path / "dense"
    state.model.save_pretrained(dense)
    prune(state)
    batch = next(iter(state.data.batches("train", 8)))
    alone, asked = (Comparison(Losses(logits={"keep": 0.3}), state, reference) for reference in (None, str(dense)))
    found = [compare.losses(compare.student.eval(), batch)["logits"] for compare in (alone, asked)]
    torch.testing.assert_close(*found)  # the dense model leaves nothing, as is supposed where none is named
    assert found[0] > Comparison(Losses(logits=1.0), state).losses(state.model, batch)["logits"]
    itself = tmp_path / "itself"
    state.model.save_pretrained(itself)
    other = Comparison(Losses(logits={"keep": 0.3}), state, str(itself)).losses(state.model, batch)["logits"]
    assert other != found[0]
    with pytest.raises(ValueError, match="no loss asks the reference"):
        Distill(losses={"logits": 1.0}, reference=str(dense))


def test_directions_are_those_of_every_block_beside_the_one_it_was(tmp_path):
    state = make_state(tmp_path, "text-classification")
    state.drop(next(iter(state.layout.stacks)), [0, 2])
    state.cut("bert.encoder.layer.0.heads", [])
    compare = Comparison(Losses(directions=1.0), state)
    (pair,) = compare.taps["directions"]
    places = [one.sites[0].module for one in pair]
    assert places == [f"bert.encoder.layer.{block}.attention.self.query" for block in (1, 2)]


@pytest.mark.parametrize("name", ["attention", "relations"])
def test_attention_is_that_of_the_last_block_with_heads(tmp_path, name):
    state = make_state(tmp_path, "text-generation")
    compare = Comparison(Losses(**{name: 1.0}), state)
    assert [one.sites[0].module for pair in compare.taps[name] for one in pair] == [
        "model.layers.2.self_attn.q_proj"
    ] * 2
    state.cut("model.layers.2.heads", [])
    compare = Comparison(Losses(**{name: {"block": 1}}), state)
    assert [one.sites[0].module for pair in compare.taps[name] for one in pair] == [
        "model.layers.1.self_attn.q_proj"
    ] * 2
    assert compare.losses(compare.student, next(iter(state.data.batches("train", 4))))[name].abs() < 1e-6
    with pytest.raises(TrainingError, match=r"no block 3; expected one of 0\.\.2"):
        Comparison(Losses(**{name: {"block": 3}}), state)


def test_heads_that_differ_in_number_are_not_compared_one_by_one(tmp_path):
    state = make_state(tmp_path, "text-classification")
    prune(state)
    with pytest.raises(TrainingError, match="1 here and 2 in the dense model; expected as many, or the loss relations"):
        Comparison(Losses(attention=1.0), state)
    for axis in [name for name in state.layout.axes if name.endswith("heads")]:
        state.cut(axis, [])
    with pytest.raises(TrainingError, match=r"no block of .bert\.encoder\.layer. has heads left"):
        Comparison(Losses(relations=1.0), state)


@pytest.mark.parametrize("dropout", [True, False])
def test_recomputing_blocks_changes_no_bit(tmp_path, dropout, monkeypatch):
    calls = []

    def recovered(name: str, **options):
        (folder := tmp_path / name).mkdir()
        state = make_state(folder, "text-generation", attention_dropout=0.2)
        prune(state)
        block = state.model.model.layers[0].self_attn
        block.register_forward_hook(lambda *_: calls.append(name))
        return distill(
            state, steps=3, validate_every=3, dropout=dropout, losses={"hidden": 1, "relations": 1}, **options
        )

    kept, again = recovered("kept"), recovered("again", recompute=True)
    assert calls.count("again") == calls.count("kept") + 3
    assert kept.figures["history"] == again.figures["history"]
    assert all(torch.equal(one, again.model.state_dict()[name]) for name, one in kept.model.state_dict().items())
    assert not any("forward" in vars(module) for module in again.model.modules())


def test_finetuning_recomputes_without_a_cache(tmp_path):
    options = {"steps": 2, "batch_size": 8, "precision": "float32", "dropout": False}
    (kept,) = Finetune(**options).run(make_state(tmp_path, "text-generation"))
    state = make_state(tmp_path, "text-generation")
    state.workshop = Workshop(step=tmp_path / "again", run=tmp_path / "run")
    (again,) = Finetune(**options, recompute=True).run(state)
    assert kept.figures["history"] == again.figures["history"]


@pytest.mark.parametrize("task", ["feature-extraction", "text-generation"])
@pytest.mark.parametrize("keep", [[0, 2], [1], [0, 1]])
def test_dropped_blocks_are_compared_with_the_ones_they_were(tmp_path, task, keep):
    state = make_state(tmp_path, task)
    (stack,) = state.layout.stacks
    state.layout = state.layout.drop(state.model, stack, keep)
    compare = Comparison(Losses(hidden=1.0), state)
    assert places(state, len(keep), 3) == [*keep[:-1], 2]
    batch = next(iter(state.data.batches("train", 8)))
    state.model.eval()
    shared = sum(place == index for index, place in enumerate(keep))  # blocks that still see what they saw
    with torch.no_grad():
        inputs = {name: batch[name] for name in batch.keys() & Comparison.inputs}
        mine = compare.student(**inputs, output_hidden_states=True).hidden_states[1:]
        theirs = compare.teacher(**inputs, output_hidden_states=True).hidden_states[1:]
    for index, place in enumerate(places(state, len(keep), 3)[:-1][:shared]):
        torch.testing.assert_close(mine[index], theirs[place])


def test_a_student_of_a_teacher_that_lost_blocks_itself_finds_its_blocks(tmp_path):
    state = make_state(tmp_path, "feature-extraction", num_hidden_layers=5)
    (stack,) = state.layout.stacks
    state.layout = state.layout.drop(state.model, stack, [0, 2, 3, 4])
    state.becomes_dense()
    state.layout = state.layout.drop(state.model, stack, [0, 2, 3])  # blocks 0, 3 and 4 of the first model
    assert places(state, 3, 4) == [0, 2, 3]


@pytest.mark.parametrize("task", TASKS)
def test_padding_never_matters(tmp_path, task):
    state = make_state(tmp_path, task)
    prune(state)
    state.model.eval()
    batch = next(iter(state.data.batches("train", 8, seed=1)))
    fill = {"input_ids": 7, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
    padded = {
        name: torch.nn.functional.pad(one, (0, 5), value=fill[name]) if one.ndim == 2 else one
        for name, one in batch.items()
    }
    compare = Comparison(Losses(**without_task(task)), state)
    short, long = compare.losses(compare.student, batch), compare.losses(compare.student, padded)
    for name in short:
        torch.testing.assert_close(short[name], long[name], rtol=1e-4, atol=1e-6)


def test_heads_are_not_run_where_no_loss_reads_them(tmp_path):
    state = make_state(tmp_path, "text-generation")
    compare = Comparison(Losses(hidden=1.0), state)
    assert compare.student is state.model.model
    assert compare.teacher is state.dense.model.model
    assert Comparison(Losses(logits=1.0), state).student is state.model


@pytest.mark.parametrize("labelled", [True, False])
def test_default_weights(labelled):
    assert Losses.fitting(TASKS["feature-extraction"], labelled) == Losses(hidden=1.0, embedding=1.0)
    assert Losses.fitting(TASKS["text-generation"], labelled) == Losses(hidden=1.0, logits=1.0)
    classifier = Losses(hidden=1, logits=1, task=1) if labelled else Losses(hidden=1, logits=1)
    assert Losses.fitting(TASKS["text-classification"], labelled) == classifier


def test_what_can_not_be_compared_is_told(tmp_path):
    state = make_state(tmp_path, "feature-extraction")
    with pytest.raises(TrainingError, match="'logits' reads predictions"):
        distill(state, losses={"logits": 1.0})
    with pytest.raises(TrainingError, match=r"'topkd' is for text-classification, .*; met question-answering"):
        Comparison(Losses(topkd=1.0), make_state(tmp_path, "question-answering"))
    with pytest.raises(TrainingError, match="feature-extraction has no loss"):
        list(Finetune().run(state))


FAMILIES = ["Bert", "DistilBert", "Roberta", "MPNet", "Electra", "Llama", "GPT2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_what_a_classifier_reads_gives_the_predictions(family, task):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "num_labels": 3, "n_layer": 2, "n_head": 2})
    model = getattr(transformers, f"{family}For{task}")(config).eval()
    inputs = {"input_ids": torch.randint(5, 40, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    for row, real in enumerate((6, 4, 1)):
        inputs["input_ids"][row, real:] = config.pad_token_id or 0
        inputs["attention_mask"][row, real:] = 0
    config.pad_token_id = config.pad_token_id or 0
    classifier = classifier_of(model)
    with torch.no_grad(), read_by(classifier) as read:
        logits = model(**inputs).logits
    torch.testing.assert_close(classifier(features(read[0], logits, inputs["attention_mask"].bool())), logits)


def test_a_model_without_a_classifier_over_classes_is_told(tmp_path):
    state = make_state(tmp_path, "text-classification")
    state.model.classifier = torch.nn.Identity()
    with pytest.raises(TrainingError, match="BertForSequenceClassification has no linear classifier, over 2 classes"):
        Comparison(Losses(lelp=1.0), state)
    with pytest.raises(ValueError, match="'lelp' reads what the classifier reads, which teach does not store"):
        Distill(losses={"lelp": 1.0}, cached=True)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_a_student_learns_how_its_teacher_splits_classes(tmp_path, task):
    state = make_state(tmp_path, task)
    narrow = copy.deepcopy(state.model.config)
    narrow.hidden_size, narrow.intermediate_size = 8, 16
    torch.manual_seed(1)
    state.model = getattr(transformers, state.task.auto).from_config(narrow)
    state.layout = layout_of(state.model)
    names, mine = set(state.model.state_dict()), state.model
    compare = Comparison(Losses(lelp={"subclasses": 4}, logits=1.0), state)
    assert compare.beside["lelp"].student.weight.shape == (4 * len(state.data.labels), 8)
    after = distill(state, steps=120, losses={"lelp": {"subclasses": 4}})
    assert after.figures["loss_after"] < 0.9 * after.figures["loss_before"]
    assert after.model is mine
    assert set(mine.state_dict()) == names
    padded = next(iter(state.data.batches("train", 8, seed=1)))
    longer = {name: torch.nn.functional.pad(one, (0, 5)) if one.ndim == 2 else one for name, one in padded.items()}
    if "labels" in padded and padded["labels"].ndim == 2:
        longer["labels"] = torch.nn.functional.pad(padded["labels"], (0, 5), value=-100)
    mine.eval()
    found = [compare.losses(mine, one)["lelp"] for one in (padded, longer)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_labels_are_asked_for_where_the_task_loss_is(tmp_path):
    state = make_state(tmp_path, "text-classification")
    source = tmp_path / "bare.jsonl"
    source.write_text("\n".join(json.dumps({"text": row_for("", number)["text"]}) for number in range(80)))
    state.data = Data.open(DataOptions(source=str(source), max_length=32), state.tokenizer, state.task)
    assert distill(state, steps=2).figures["losses"] == {"hidden": 1.0, "logits": 1.0}
    with pytest.raises(CompressError, match="reads labels"):
        distill(state, steps=3, losses={"task": 1.0})


@pytest.mark.parametrize("task", [name for name in TASKS if name != "feature-extraction"])
def test_finetuning_learns_the_task_and_makes_the_teacher(tmp_path, task):
    state = make_state(tmp_path, task)
    before = state.dense.model
    options = {"steps": 40, "batch_size": 16, "learning_rate": 0.01, "precision": "float32"}
    (after,) = Finetune(**options).run(state)
    figures = json.loads(json.dumps(after.figures))
    assert figures["best_step"] > 0
    assert figures["history"][-1]["loss"] < figures["history"][1]["loss"]
    assert set(figures["scores"][TASKS[task].metric]) == {"value", "low", "high", "count"}
    assert after.dense.model is not before
    weights = after.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in after.dense.model.state_dict().items())


def test_a_teacher_that_no_loss_asks_is_not_run(tmp_path):
    state = make_state(tmp_path, "text-classification")
    calls = []
    state.dense.model.register_forward_hook(lambda *_: calls.append(1))
    batch = next(iter(state.data.batches("train", 4)))
    for losses, run in (({"task": 1}, 0), ({"task": 1, "logits": 1}, 1)):
        compare = Comparison(Losses(**losses), state)
        compare.losses(compare.student, batch)
        assert len(calls) == run


def test_the_passes_are_light_to_import():
    assert not hasattr(module, "torch")


def test_a_student_that_learns_its_teachers_errors_is_told_of(tmp_path):
    state = make_state(tmp_path, "text-classification")
    with torch.no_grad():  # a student that knows nothing, and a teacher that knows the labels no better
        state.model.classifier.weight.zero_()
        state.model.classifier.bias.zero_()
    after = distill(state, losses={"logits": 1.0})
    history = after.figures["history"]
    kept = next(entry for entry in history if entry["step"] == after.figures["best_step"])
    with torch.no_grad():
        found = label_loss(after.model.eval(), state.data.batches("validation", 16, seed=0))
    assert (history[0]["labels"], kept["labels"]) == pytest.approx((math.log(2), found), rel=1e-4)
    (told,) = after.figures["warnings"]
    assert "while the loss on labels rose" in told


@pytest.mark.parametrize(
    ("labels", "said"),
    [((3, 2, 1), False), ((3, 1, 2), True), ((1, 1.005, 1.005), False), ((1, 2, 3), True)],
)
def test_the_monitor_speaks_where_the_distance_falls_and_the_loss_on_labels_rises(labels, said):
    history = [{"step": step, "validation": 3.0 - step, "labels": float(one)} for step, one in enumerate(labels)]
    assert bool(hacked(history)) == said
    assert not hacked([{"step": entry["step"], "validation": entry["validation"]} for entry in history])
    # What came after the weights that are kept does no harm.
    assert bool(hacked([*history, {"step": 9, "validation": 5.0, "labels": 99.0}])) == said
