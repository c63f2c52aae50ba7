"""Mixtures: corpora are packed apart, their shares follow the gaps, and a killed run has the shares it had."""

from __future__ import annotations

import random

import pytest
import torch

from compress.data import Data, DataOptions
from compress.data.rows import read_rows, write_rows
from compress.errors import DataError
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.distillation.mixing import LEAST, Mixing, reweighed
from passes.distillation.mixture import Mixture
from tests.test_distill import WORDS, distill, make_state, prune
from tests.texts import write_lines
from tests.world import power_cut

HALVES = {"low": WORDS[:20], "high": WORDS[20:]}


def rows(count: int = 160, ratio: int = 4) -> list[dict[str, str]]:
    """Texts of two corpora that share no word, the first of which has most."""
    draw = random.Random(0)
    names = ["high" if number % ratio == 0 else "low" for number in range(count)]
    return [{"text": " ".join(draw.choices(HALVES[name], k=draw.randint(8, 20))), "from": name} for name in names]


def of_two(folder, **options):
    folder.mkdir(exist_ok=True)
    state = make_state(folder, "text-generation")
    given = {"source": write_lines(folder / "corpora.jsonl", rows()), "domain": "from", "max_length": 32, **options}
    state.data = Data.open(DataOptions(**given), state.tokenizer, state.task)
    return state


# Data


def test_no_sequence_mixes_corpora_and_none_loses_a_token(tmp_path):
    data = of_two(tmp_path).data
    part, found = data.split("train"), data.domains("train")
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(data.count("train")))
    for name, numbers in found.items():
        words = {word for row in part.rows if row.domain == name for word in row.texts[0].split()}
        known = set(data.tokenizer.convert_tokens_to_ids(list(words))) | set(data.tokenizer.all_special_ids)
        assert {int(token) for number in numbers for token in part.encoded.sequences[number]["input_ids"]} <= known
    plain = of_two(tmp_path, domain=None).data
    assert plain.fingerprint != data.fingerprint
    assert set(plain.domains("train")) == {""}
    lengths = [
        sum(len(one["input_ids"]) - 2 for one in each.split("train").encoded.sequences) for each in (data, plain)
    ]
    assert abs(lengths[0] - lengths[1]) <= 1  # the very last token of a corpus has nothing to be read with


def test_a_missing_column_is_told_before_and_at_reading(tmp_path):
    source = write_lines(tmp_path / "corpora.jsonl", rows())
    options = DataOptions(source=source, domain="form")
    (told,) = options.problems("text-generation")
    assert "no column 'form'" in told
    assert "did you mean 'from'" in told


def test_rows_on_disk_remember_their_corpus(tmp_path):
    kept = of_two(tmp_path).data.split("train").rows
    assert read_rows(write_rows({"train": kept}, tmp_path))["train"] == kept


# Shares


def test_shares_follow_gaps_and_nothing_else():
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    same = reweighed(shares, torch.full((3,), 7.0, dtype=torch.float64), 1.0)
    torch.testing.assert_close(same, (1 - LEAST) * shares + LEAST / 3)
    gaps = torch.tensor([0.1, 2.0, 0.1], dtype=torch.float64)
    moved = reweighed(shares, gaps, 1.0)
    assert moved[1] > shares[1]
    torch.testing.assert_close(moved.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close((moved[0] / moved[2]).item(), 2.5, atol=1e-3, rtol=0)
    twice, once = reweighed(reweighed(shares, gaps, 0.5), gaps, 0.5), reweighed(shares, gaps, 1.0)
    torch.testing.assert_close(twice, once, atol=3 * LEAST, rtol=0)
    starved = reweighed(shares, torch.tensor([0.0, 900.0, 0.0], dtype=torch.float64), 1.0)
    assert starved.min() >= LEAST / 3 - 1e-12


def mixing(state, gaps, done, **options) -> Mixing:
    """Mixing with gaps that are given, by the corpus."""
    asked: list[str] = []

    def gap(batches) -> float:
        words = {int(token) for batch in batches for token in batch["input_ids"].flatten()}
        name = "low" if state.tokenizer.convert_tokens_to_ids(WORDS[0]) in words else "high"
        asked.append(name)
        return gaps[name]

    made = Mixing(Mixture(**options), state.data, gap, lambda: done[0])
    made.asked = asked
    return made


def test_shares_begin_as_the_data_has_them_and_change_so_often(tmp_path):
    state, done = of_two(tmp_path), [0.0]
    made = mixing(state, {"low": 0.0, "high": 1.0}, done, updates=4)
    sizes = {name: len(numbers) for name, numbers in state.data.domains("train").items()}
    assert made.figures()["low"] == pytest.approx(sizes["low"] / sum(sizes.values()))
    batch, seen = state.data.batch("train", range(4)), []
    for step in range(40):
        done[0] = (step + 0.5) / 40
        made.turn(batch)
        seen.append(made.figures()["high"])
    assert len(made.asked) == 4 * 2
    assert [step for step in range(1, 40) if seen[step] != seen[step - 1]] == [10, 20, 30]
    assert seen == sorted(seen)


def test_batches_are_of_one_corpus_drawn_by_its_share(tmp_path):
    state = of_two(tmp_path)
    made = mixing(state, {"low": 0.0, "high": 0.0}, [0.0], updates=1)
    given = state.data.batch("train", range(3))

    def drawn(seed: int):
        torch.manual_seed(seed)
        return made.turn(given)["input_ids"]

    assert all(torch.equal(drawn(seed), drawn(seed)) for seed in range(5))
    high = {state.tokenizer.convert_tokens_to_ids(word) for word in HALVES["high"]}
    kinds = []
    for seed in range(300):
        found = {int(token) for token in drawn(seed).flatten()} - set(state.tokenizer.all_special_ids)
        assert found <= high or not found & high
        assert len(drawn(seed)) == 3
        kinds.append(found <= high)
    assert sum(kinds) / 300 == pytest.approx(made.figures()["high"], abs=0.08)


@pytest.mark.parametrize(("options", "message"), [
    ({"domain": None}, "mixture needs several corpora"),
    ({"validation_rows": 1}, "no row of '(low|high)' is left for validation"),
])  # fmt: skip
def test_data_that_cannot_be_mixed_is_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        distill(of_two(tmp_path, **options), mixture={})


# Distillation


def damaged(folder, forgotten: str = "high"):
    """A student that reads the words of one corpus wrongly."""
    state = of_two(folder)
    prune(state)
    ids = state.tokenizer.convert_tokens_to_ids(list(HALVES[forgotten]))
    with torch.no_grad():
        table = state.model.get_input_embeddings().weight
        table[ids] = table[ids].flip(0)
    return state


def test_what_was_forgotten_is_trained_more(tmp_path):
    found = {}
    for name in HALVES:
        figures = distill(damaged(tmp_path / name, name), losses={"logits": 1}, mixture={"updates": 10}).figures
        assert sum(figures["mixture"].values()) == pytest.approx(1)
        assert figures["loss_after"] < 0.5 * figures["loss_before"]
        found[name] = figures["mixture"]
    assert found["high"]["high"] > found["low"]["high"] + 0.05


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    options = {"steps": 12, "losses": {"logits": 1}, "mixture": {"updates": 6}, "checkpoint_every": 4}
    straight = distill(damaged(tmp_path / "straight"), **options)
    with power_cut(Mixing, "turn", 7):
        distill(damaged(tmp_path / "killed"), **options)
    resumed = distill(damaged(tmp_path / "killed"), **options)
    assert straight.figures["best_step"] > 4
    assert all(torch.equal(one, resumed.model.state_dict()[name]) for name, one in straight.model.state_dict().items())
    assert straight.figures["history"] == resumed.figures["history"]
    assert straight.figures["mixture"] == resumed.figures["mixture"]


def test_a_gap_leaves_the_students_mode_and_takes_no_gradient(tmp_path):
    state = damaged(tmp_path)
    compare = Comparison(Losses(logits=1), state)
    compare.student.train()
    batches = [state.data.batch("validation", range(3), seed=0)]
    assert compare.gap(batches) == compare.gap(batches) > 0
    assert compare.student.training
