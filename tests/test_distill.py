"""Distill and Finetune: a student finds back to its teacher, and a fine-tuned model is the teacher of what follows."""

import copy
import json
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
from passes.distillation.compare import Comparison
from passes.distillation.distill import Distill
from passes.distillation.finetune import Finetune
from passes.distillation.losses import LOSSES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"word{number}" for number in range(40))
SIZES = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
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


def prune(state: State) -> None:
    """Leave the model with half of its columns and all heads but one."""
    for name, axis in list(state.layout.axes.items()):
        state.cut(name, range(axis.units // 2) if axis.kind == "columns" else range(axis.units - 1))


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
    state = make_state(tmp_path, "text-classification")
    prune(state)
    after = distill(state, losses={name: 1.0})
    assert after.figures["loss_after"] < after.figures["loss_before"]
    assert set(after.figures["history"][-1]) == {"step", "loss", "validation", name}


def test_a_killed_recovery_resumes_to_the_same_bits(tmp_path, monkeypatch):
    def pruned(folder):
        folder.mkdir(exist_ok=True)
        state = make_state(folder, "text-classification")
        prune(state)
        return state

    straight = distill(pruned(tmp_path / "straight"), dropout=True, checkpoint_every=4)
    whole, calls = Comparison.losses, iter(range(1000))

    def failing(self, student, batch):
        if next(calls) == 20:
            raise RuntimeError("power cut")
        return whole(self, student, batch)

    monkeypatch.setattr(Comparison, "losses", failing)
    with pytest.raises(RuntimeError):
        distill(pruned(tmp_path / "killed"), dropout=True, checkpoint_every=4)
    resumed = distill(pruned(tmp_path / "killed"), dropout=True, checkpoint_every=4)
    assert all(torch.equal(one, resumed.model.state_dict()[name]) for name, one in straight.model.state_dict().items())
    assert straight.figures["history"] == resumed.figures["history"]


@pytest.mark.parametrize("task", ["feature-extraction", "text-generation"])
@pytest.mark.parametrize("keep", [[0, 2], [1], [0, 1]])
def test_dropped_blocks_are_compared_with_the_ones_they_were(tmp_path, task, keep):
    state = make_state(tmp_path, task)
    (stack,) = state.layout.stacks
    state.layout = state.layout.drop(state.model, stack, keep)
    compare = Comparison(Losses(hidden=1.0), state)
    assert compare.places(len(keep), 3) == [*keep[:-1], 2]
    batch = next(iter(state.data.batches("train", 8)))
    state.model.eval()
    shared = sum(place == index for index, place in enumerate(keep))  # blocks that still see what they saw
    with torch.no_grad():
        inputs = {name: batch[name] for name in batch.keys() & Comparison.inputs}
        mine = compare.student(**inputs, output_hidden_states=True).hidden_states[1:]
        theirs = compare.teacher(**inputs, output_hidden_states=True).hidden_states[1:]
    for index, place in enumerate(compare.places(len(keep), 3)[:-1][:shared]):
        torch.testing.assert_close(mine[index], theirs[place])


def test_a_student_of_a_teacher_that_lost_blocks_itself_finds_its_blocks(tmp_path):
    state = make_state(tmp_path, "feature-extraction", num_hidden_layers=5)
    (stack,) = state.layout.stacks
    state.layout = state.layout.drop(state.model, stack, [0, 2, 3, 4])
    state.becomes_dense()
    state.layout = state.layout.drop(state.model, stack, [0, 2, 3])  # blocks 0, 3 and 4 of the first model
    assert Comparison(Losses(hidden=1.0), state).places(3, 4) == [0, 2, 3]


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
    assert Losses.fitting(TASKS["text-classification"], labelled) == Losses(hidden=1, logits=1, task=float(labelled))


def test_what_can_not_be_compared_is_told(tmp_path):
    state = make_state(tmp_path, "feature-extraction")
    with pytest.raises(TrainingError, match="'logits' reads predictions"):
        distill(state, losses={"logits": 1.0})
    with pytest.raises(TrainingError, match="feature-extraction has no loss"):
        list(Finetune().run(state))
    with pytest.raises(ValueError, match="every loss has a weight of 0"):
        Distill(losses={"hidden": 0.0})


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


def test_the_passes_are_light_to_import():
    assert not hasattr(module, "torch")
