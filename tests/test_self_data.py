"""Self-data: a decoder writes on as it would alone, its answers stay where they agree, and a run goes on with them."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from compress.data import Data, DataOptions
from compress.data.batches import IGNORED
from compress.data.encode import ask
from compress.data.rows import read_lines, read_rows, write_rows
from compress.data.sources import Row
from compress.devices import accelerated
from compress.errors import DataError
from compress.families import layout_of
from compress.plan import Plan, Tables
from compress.runner import Run, prepare
from compress.state import State, Teacher, Workshop
from compress.target import Target
from compress.tasks import TASKS
from compress.writing import ends_of, write_on
from passes import PASSES
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.rows import rewriting
from passes.rows.rewriting import agree, write_answers
from passes.rows.self_data import NUMBER, SelfData
from tests.texts import model, sentences, tokenizer, write_lines

END = 3
PROMPTS = [[2, 7, 9], [2, 5, 6, 7, 8, 9, 10], [2], [2, 11, 12, 13]]


def decoder():
    made = model("AutoModelForCausalLM", "llama", eos_token_id=END, bos_token_id=2)
    made.generation_config.pad_token_id = 0
    return made


def make_rows() -> list[dict]:
    return [{"question": text, "answer": text.split()[0]} for text in sentences(60)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a decoder and questions with answers."""
    folder = tmp_path_factory.mktemp("answers")
    decoder().save_pretrained(folder / "model")
    made = tokenizer()
    made.eos_token = "[SEP]"
    made.save_pretrained(folder / "model")
    write_lines(folder / "rows.jsonl", make_rows())
    return folder


def make_state(world, folder) -> State:
    task = TASKS["text-generation"]
    dense = Teacher(str(world / "model"), task)
    options = DataOptions(source=str(world / "rows.jsonl"), text="question", label="answer", max_length=32)
    data = Data.open(options, dense.tokenizer, task)
    mine = task.load(dense.source)
    workshop = Workshop(folder / "step", folder / "run")
    return State(mine, dense.tokenizer, layout_of(mine), task, Target(), workshop, dense, data)


def greedy(one, prompt: list[int], most: int) -> list[int]:
    """What is likeliest, token by token, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != END):
        with torch.no_grad():
            ids.append(int(one(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# Writing on


def test_prompts_of_any_length_are_written_on_as_each_alone():
    one = decoder().double()
    one.generation_config.repetition_penalty = 5.0  # its own settings play no part
    found = write_on(one, PROMPTS, most=9, ends={END})
    assert one.generation_config.repetition_penalty == 5.0
    assert found == [greedy(one, prompt, 9) for prompt in PROMPTS]


def test_an_end_ends_and_is_written():
    one = decoder()
    first = write_on(one, PROMPTS, most=9, ends=())
    stop = first[0][3]
    one.generation_config.eos_token_id = stop
    assert write_on(one, PROMPTS, most=9, ends=()) == first
    found = write_on(one, PROMPTS, most=9, ends={stop})
    assert found[0] == first[0][: first[0].index(stop) + 1]
    assert [len(tokens) for tokens in first] == [9] * len(PROMPTS)


def test_draws_follow_the_temperature_and_the_seed():
    def drawn(temperature: float, seed: int) -> list[int]:
        torch.manual_seed(seed)
        return [row[0] for row in write_on(one, [[2, 7]] * 4000, most=1, ends=(), temperature=temperature)]

    one = decoder()
    assert drawn(1.0, 0) == drawn(1.0, 0) != drawn(1.0, 1)
    with torch.no_grad():
        logits = one(torch.tensor([[2, 7]])).logits[0, -1]
    for temperature in (0.5, 2.0):
        shares = torch.bincount(torch.tensor(drawn(temperature, 0)), minlength=len(logits)) / 4000
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.03, rtol=0)


def test_writing_leaves_the_mode_and_takes_both_ends():
    one = decoder().train()
    write_on(one, PROMPTS, most=1, ends=())
    assert one.training
    one.generation_config.eos_token_id = [7, 8]
    assert ends_of(one, tokenizer()) == {7, 8}
    made = tokenizer()
    made.eos_token = "[SEP]"
    assert ends_of(one, made) == {3, 7, 8}


@pytest.mark.gpu
def test_an_accelerator_writes_the_same_and_the_model_comes_home():
    one = decoder().double()
    with accelerated(one):
        assert one.device.type != "cpu"
        found = write_on(one, PROMPTS, most=9, ends={END})
    assert one.device.type == "cpu"
    assert found == write_on(one, PROMPTS, most=9, ends={END})


# Questions with answers as data


def test_the_answer_alone_has_labels(world, tmp_path):
    data = make_state(world, tmp_path).data
    part = data.split("train")
    for row, sequence in zip(part.rows, part.encoded.sequences, strict=True):
        answer = [*data.tokenizer(row.label, add_special_tokens=False)["input_ids"], END]
        (asked,) = ask(data.tokenizer, row.texts)
        assert sequence["input_ids"].tolist() == [*asked, *answer]
        assert sequence["labels"].tolist() == [IGNORED] * len(asked) + answer
    batch = data.batch("train", range(8))
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_a_chat_template_asks(world, tmp_path):
    made = make_state(world, tmp_path).tokenizer
    before = make_state(world, tmp_path).data.fingerprint
    made.chat_template = (
        "{% for one in messages %}the {{ one.content }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    assert ask(made, ["cat sees"]) == [made("the cat sees a", add_special_tokens=False)["input_ids"]]
    options = make_state(world, tmp_path).data.options
    assert Data.open(options, made, TASKS["text-generation"]).fingerprint != before


@pytest.mark.parametrize(("length", "left"), [(8, "leaves no room"), (32, "")])
def test_what_has_no_room_for_an_answer_is_told(world, tmp_path, capsys, length, left):
    rows = [{"question": "the cat " * 3 + text, "answer": "big"} for text in sentences(40, longest=3)]
    rows += [{"question": text, "answer": "big"} for text in sentences(40, seed=1, longest=4)]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    state = make_state(world, tmp_path)
    options = DataOptions(source=source, text="question", label="answer", max_length=length)
    data = Data.open(options, state.tokenizer, state.task)
    part = data.split("train")
    assert (len(part.encoded.sequences) < len(part.rows)) == bool(left)
    assert left in capsys.readouterr().err
    assert all((sequence["labels"] != IGNORED).any() for sequence in part.encoded.sequences)


@pytest.mark.parametrize(("rows", "message"), [
    ([{"question": text, "answer": 7} for text in sentences(9)], r"rows.jsonl:\d+: the answer is 7; expected text"),
    ([{"question": text * 9, "answer": "big"} for text in sentences(9)], "no room for the answer in .*; expected more"),
])  # fmt: skip
def test_unfit_answers_are_refused(world, tmp_path, rows, message):
    state = make_state(world, tmp_path)
    options = DataOptions(
        source=write_lines(tmp_path / "rows.jsonl", rows), text="question", label="answer", max_length=8
    )
    with pytest.raises(DataError, match=message):
        next(Data.open(options, state.tokenizer, state.task).batches("train", 1))


def test_predictions_of_the_answer_alone_are_compared(world, tmp_path):
    state = make_state(world, tmp_path)
    with torch.no_grad():
        state.model.lm_head.weight.mul_(0.9)
    batch = state.data.batch("train", range(6))
    found = Comparison(Losses(logits=1), state).losses(state.model, batch)["logits"]
    known = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p, q = (one(**known).logits[:, :-1].log_softmax(-1) for one in (state.teacher, state.model))
    rows = batch["labels"][:, 1:] != IGNORED
    torch.testing.assert_close(found.detach(), (p.exp() * (p - q)).sum(-1)[rows].mean())


# Rows of other files


def test_rows_are_read_as_written_and_equal_ones_share_a_file(tmp_path):
    splits = {"train": [Row(("a\u2028b", "{c}"), "d\ne", "x:1"), Row((("a", "b"),), ["O", "B"])], "validation": []}
    path = write_rows(splits, tmp_path)
    assert read_rows(path) == {"train": splits["train"]}
    assert read_rows(path)["train"][0].place == "x:1"
    assert write_rows(splits, tmp_path) == path != write_rows({"train": splits["train"][:1]}, tmp_path)


def test_data_with_rows_keeps_its_other_splits_and_is_one_object(world, tmp_path):
    data = make_state(world, tmp_path).data
    path = write_rows({"train": data.split("test").rows}, tmp_path)
    other = data.with_rows(path)
    assert other is data.with_rows(path)
    assert other.split("train").rows == data.split("test").rows
    assert other.split("test") is data.split("test")
    assert other.fingerprint != data.fingerprint
    smaller = tokenizer(framed=False)
    smaller.add_tokens("more")
    assert data.retokenized(smaller).with_rows(path).tokenizer is smaller


# Rewriting


@pytest.mark.parametrize(("one", "other", "same"), [
    ("It is 48/2 = 24.\n#### 1,072", "So she has 1072", True),
    ("#### 72", "72.0 in all", True),
    ("#### 72", "73", False),
    ("#### 72", "I don't know", False),
    ("yes", "no", True),  # no result in either
    ("-3", "3", False),
    ("The year 2024.", "2,024", True),
])  # fmt: skip
def test_results_agree_however_numbers_are_written(one, other, same):
    assert agree(one, other, NUMBER) == same == agree(other, one, NUMBER)


def test_a_group_of_the_pattern_is_the_result():
    assert agree("answer: The Cat. end", "well, answer: the cat.", r"answer: ([\w ]+)")


def test_a_kill_costs_one_batch_and_no_answer(world, tmp_path, monkeypatch):
    state = make_state(world, tmp_path)
    questions = [row.texts[0] for row in state.data.split("train").rows]

    def write(folder):
        with torch.random.fork_rng():
            return write_answers(
                state.dense.model, state.tokenizer, questions, tmp_path / folder,
                tokens=5, temperature=1.0, size=8, seed=0,
            )  # fmt: skip

    whole, calls = write("whole"), []

    def killed(*given, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_on(*given, **options)

    monkeypatch.setattr(rewriting, "write_on", killed)
    with pytest.raises(KeyboardInterrupt):
        write("cut")
    assert write("cut") == whole
    assert len(calls) == 1 + -(-len(questions) // 8)
    assert {lack for _, lack in whole} == {"", "no end"}


def test_what_has_no_room_is_not_asked(world, tmp_path):
    state = make_state(world, tmp_path)  # of 64 positions
    (_, short), (text, lack) = write_answers(
        state.dense.model, state.tokenizer, ["cat", "cat " * 50], tmp_path, tokens=30, temperature=0, size=2, seed=0
    )
    assert short != "no room"
    assert (text, lack) == ("", "no room")


def test_answers_that_agree_are_rewritten_and_the_test_split_stays(world, tmp_path):
    state = make_state(world, tmp_path)
    step = SelfData(request="{question}", tokens=12, result=r"(\w+)$", batch_size=8)
    before = {name: list(state.data.split(name).rows) for name in state.data.splits}
    written = write_answers(
        state.dense.model, state.tokenizer, [row.texts[0] for row in before["train"]], tmp_path / "beforehand",
        tokens=12, temperature=0, size=8, seed=0,
    )  # fmt: skip
    # Every other answer ends as the model's own does.
    rows = [
        Row(row.texts, f"well {text.split()[-1]}" if number % 2 and text else "none")
        for number, (row, (text, _)) in enumerate(zip(before["train"], written, strict=True))
    ]
    state.replace_rows({"train": rows})
    (after,) = step.run(state)
    expected = [
        text if not lack and number % 2 and text else row.label
        for number, (row, (text, lack)) in enumerate(zip(rows, written, strict=True))
    ]
    assert [row.label for row in after.data.split("train").rows] == expected != [row.label for row in rows]
    assert after.data.split("test").rows == before["test"]
    figures = after.figures
    assert figures["rewritten"] + sum(figures["kept"].values()) == len(rows) + len(before["validation"])
    assert figures["kept"]["another result"] > 0
    assert figures["examples"]["rewritten"][0]["written"] in expected
    assert len(after.facts["rows"]["files"]) == 2


def test_texts_with_braces_are_asked_as_they_are():
    step = SelfData(request="{question}|{answer}|{other}")
    assert step.question(Row(("{answer}", "b"), "{question}")) == "{answer}\n\nb|{question}|{other}"


@pytest.mark.parametrize(("options", "message"), [
    ({"request": "say {answer}"}, r"expected a text with \{question\}"),
    ({"result": "("}, "expected a regular expression"),
])  # fmt: skip
def test_options_that_ask_nothing_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        SelfData(**options)


def test_data_without_answers_is_refused(world, tmp_path):
    state = make_state(world, tmp_path)
    options = DataOptions(source=str(world / "rows.jsonl"), text="question")
    state.data = Data.open(options, state.tokenizer, state.task)
    with pytest.raises(DataError, match="holds no answers to rewrite"):
        list(SelfData().run(state))


# A whole run


def test_a_stored_run_has_its_rows_again_wherever_it_lies(world, tmp_path):
    passes = [
        {"self_data": {"request": "{question}", "result": None, "tokens": 6}},
        {"distill": {"steps": 2, "losses": {"task": 1}, "precision": "float32"}},
    ]
    data = {"source": str(world / "rows.jsonl"), "text": "question", "label": "answer", "max_length": 32}
    given = {"model": str(world / "model"), "data": data, "passes": passes, "export": []}
    plan = Plan.read(given, Tables(PASSES, {}))
    assert plan.check() == []
    first = Run(plan, prepare(tmp_path / "out", fresh=False))
    (leaf,) = first.go()
    made = first.state(leaf).data
    (name,) = first.state(leaf).facts["rows"]["files"]
    labels = [row.label for row in made.split("train").rows]
    assert labels != [row.label for row in first.data.split("train").rows]
    (tmp_path / "out").rename(tmp_path / "moved")
    again = Run(plan, prepare(tmp_path / "moved", fresh=False))
    (leaf,) = again.go()
    found = again.state(leaf).data
    assert [row.label for row in found.split("train").rows] == labels
    assert found.fingerprint == made.fingerprint != again.data.fingerprint
    assert found.split("test") is again.data.split("test")
    assert len(read_lines(tmp_path / "moved" / ".cache" / "rows" / name)) == len(labels) + len(
        found.split("validation").rows
    )
