"""Select: rows are scored as each alone, and those stay in which the dense model is furthest ahead."""

from __future__ import annotations

import pytest
import torch

from compress.data import Data, DataOptions
from compress.data.batches import IGNORED
from compress.errors import DataError
from compress.state import State
from compress.tasks import TASKS
from passes.rows import scoring
from passes.rows.scoring import mean_log_likelihoods
from passes.rows.select import Select
from tests.test_self_data import make_state, world  # noqa: F401 - a fixture
from tests.texts import model, sentences, tokenizer, write_lines


@pytest.fixture
def state(world, tmp_path) -> State:  # noqa: F811
    return make_state(world, tmp_path)


def texts(state: State, folder, rows: list[dict], **options) -> State:
    """The state with plain texts for data."""
    source = write_lines(folder / "texts.jsonl", rows)
    state.data = Data.open(DataOptions(source=source, max_length=32, **options), state.tokenizer, state.task)
    return state


@pytest.fixture
def reference(tmp_path):
    """A folder with a model of other weights and the same tokens."""
    made = model("AutoModelForCausalLM", "llama", tie_word_embeddings=True)
    made.save_pretrained(tmp_path / "reference")
    told = tokenizer()
    told.save_pretrained(tmp_path / "reference")
    return str(tmp_path / "reference")


def alone(one, ids: list[int], first: int) -> float:
    """The mean log-likelihood of the tokens from the place `first` on."""
    with torch.no_grad():
        logs = one(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(first, len(ids))) / (len(ids) - first)


@pytest.mark.parametrize("kind", ["answers", "texts", "pairs"])
@pytest.mark.parametrize("size", [1, 7])
def test_a_row_is_scored_as_it_is_alone(state, tmp_path, kind, size):
    if kind == "texts":
        texts(state, tmp_path, [{"text": text} for text in sentences(40)])
    if kind == "pairs":
        rows = [{"a": text, "b": text[::2] + " cat"} for text in sentences(40)]
        texts(state, tmp_path, rows, text=("a", "b"))
    part = state.data.split("train")
    found = mean_log_likelihoods(state.model, part, tmp_path / "scores", size)
    for row, score in zip(part.rows, found, strict=True):
        if kind == "answers":
            sequence = next(one for one, owner in _owned(part) if part.rows[owner] is row)
            start = int((sequence["labels"] != IGNORED).argmax())
            expected = alone(state.model, sequence["input_ids"].tolist(), start)
        else:
            ids = [state.tokenizer(text)["input_ids"] for text in row.texts]
            parts = [(alone(state.model, one, 1) * (len(one) - 1), len(one) - 1) for one in ids]
            expected = sum(total for total, _ in parts) / sum(count for _, count in parts)
        assert score == pytest.approx(expected, abs=1e-4)


def _owned(part):
    return zip(part.encoded.sequences, part.encoded.owners, strict=True)


def test_a_kill_costs_one_shard(state, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SHARD", 2)
    part, whole, calls = state.data.split("train"), scoring.log_likelihoods, []
    expected = mean_log_likelihoods(state.model, part, tmp_path / "straight", 5)

    def failing(*given):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(scoring, "log_likelihoods", failing)
    with pytest.raises(KeyboardInterrupt):
        mean_log_likelihoods(state.model, part, tmp_path / "killed", 5)
    assert mean_log_likelihoods(state.model, part, tmp_path / "killed", 5) == expected
    assert len(calls) == 6 + -(-len(part.rows) // 5) - 4


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_stays_has_the_largest_gains_in_the_order_of_the_data(state, reference, tmp_path, share):
    texts(state, tmp_path, [{"text": text} for text in sentences(60)])
    rows, held = state.data.split("train").rows, state.data.split("validation")
    other = state.task.load(reference).eval()
    gains = {}
    for row in rows:
        ids = state.tokenizer(row.texts[0])["input_ids"]
        gains[row] = alone(state.dense.model, ids, 1) - alone(other, ids, 1)
    (after,) = Select(reference=reference, share=share, batch_size=7).run(state)
    kept = after.data.split("train").rows
    assert len(kept) == -(-round(share * 1000) * len(rows) // 1000)
    assert min(gains[row] for row in kept) >= max(gains[row] for row in rows if row not in kept)
    assert [row for row in rows if row in kept] == kept
    assert after.data.split("validation") is held
    assert after.figures["gain"]["after"] == pytest.approx(sum(gains[row] for row in kept) / len(kept), abs=1e-4)
    assert after.figures["gain"]["after"] > after.figures["gain"]["before"]


def test_a_row_without_room_for_its_answer_is_not_kept(state, reference, tmp_path):
    rows = [{"text": text, "kind": "big"} for text in sentences(40, longest=5)]
    rows += [{"text": "the cat " * 20 + text, "kind": "big"} for text in sentences(40)]
    texts(state, tmp_path, rows, label="kind")
    (after,) = Select(reference=reference, share=0.99).run(state)
    assert all(len(row.texts[0].split()) < 20 for row in after.data.split("train").rows)


def test_a_reference_of_other_tokens_is_refused(state, reference):
    state.tokenizer.add_tokens("more")
    with pytest.raises(DataError, match="reads other tokens"):
        list(Select(reference=reference).run(state))


def test_a_model_that_does_not_write_is_refused(state, reference):
    state.task = TASKS["fill-mask"]
    with pytest.raises(DataError, match="text-generation reads them; met fill-mask"):
        list(Select(reference=reference).run(state))
