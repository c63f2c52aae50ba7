"""The report: one schema, three files that tell the same, everything escaped, nothing absent shown as measured."""

from __future__ import annotations

import copy
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import DataError
from compress.report import check, numbers, pictures, render, wording


def axes(stack: str, blocks: int, heads: int, columns: int, share: float, seed: int = 0) -> list[dict[str, Any]]:
    """Axes of a pruned model: later blocks lose more, the last its attention, the middle one its feed-forward."""
    draw = random.Random(seed)
    found = []
    for block in range(blocks):
        left = min(1.0, max(0.05, share * (1.4 - 0.8 * block / blocks)))
        for kind, dense in (("heads", heads), ("columns", columns)):
            removed = (kind == "heads" and block == blocks - 1) or (kind == "columns" and block == blocks // 2)
            kept = [] if removed and share < 0.5 else sorted(draw.sample(range(dense), max(1, round(dense * left))))
            name = f"{stack}.{block}"
            found.append({"name": f"{name}.{kind}", "kind": kind, "block": name, "dense": dense, "kept": kept})
    return found


def branch(name: str, promised: float | None, measured: float | None, **more: Any) -> dict[str, Any]:
    """A branch of a sentence encoder with all that the runner tells."""
    spread = None if measured is None else 0.012 * measured
    quality = round(1.0 - 0.02 * ((measured or 1.0) - 1.0) ** 2, 4)
    return {
        "name": name,
        "promised_speedup": promised,
        "measured_speedup": measured,
        "measured_low": None if spread is None else measured - spread,
        "measured_high": None if spread is None else measured + spread,
        "met": None if promised is None or measured is None else measured >= 0.975 * promised,
        "parameters": 17_400_000,
        "bytes": 69_800_000,
        "milliseconds": None if measured is None else 28.4 / measured,
        "timing": None if measured is None else {"low": 28.0 / measured, "high": 28.8 / measured, "quantised": False},
        "quality_before_recovery": {"cosine": quality - 0.14},
        "quality_before_recovery_interval": {"cosine": [quality - 0.145, quality - 0.134]},
        "quality": {"cosine": quality, "spearman": 0.8123},
        "quality_interval": {"cosine": [quality - 0.003, quality + 0.003], "spearman": [0.79, 0.83]},
        "artifacts": [
            {
                "kind": "huggingface",
                "path": f"{name}/model",
                "bytes": 69_800_000,
                "sha256": "5e" * 32,
                "worst_error": 0,
            },
            {
                "kind": "onnx",
                "path": f"{name}/model.onnx",
                "bytes": 69_900_000,
                "sha256": "a1" * 32,
                "worst_error": 3e-6,
            },
        ],
        "steps": [
            {
                "pass": "calibrate",
                "options": {"samples": 256},
                "seconds": 14.2,
                "kept": True,
                "reason": "",
                "figures": {},
            },
            {
                "pass": "ziplm",
                "options": {"speedups": [1.5, 2.0, 3.0, 4.0]},
                "seconds": 171.4,
                "kept": True,
                "reason": "closed after 2 corrections of the budget",
                "figures": {
                    "skipped": {"pooler.dense": "the model's output doesn't read it"},
                    "losses": list(range(99)),
                },
            },
            {
                "pass": "distill",
                "options": {"steps": 1200, "weights": {"hidden": 1.0, "cosine": 0.5}},
                "seconds": 402.0,
                "kept": True,
                "reason": "cosine on validation rose from 0.81 to 0.94",
                "figures": {"best_step": 1100},
            },
        ],
        "axes": axes("encoder.layer", 6, 12, 1536, 1 / (measured or 1.0)),
        **more,
    }


def report(*branches: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A run on ONNX Runtime CPU."""
    target = {"device": "cpu", "runtime": "onnxruntime", "batch": 1, "sequence": 128, "threads": 1, "dtype": "float32"}
    return {
        "schema": 1,
        "environment": {"cpu": "Example CPU @ 2.1 GHz", "cores": 2, "gpu": None, "versions": {"torch": "2.13.0"}},
        "plan": {"model": "models/minilm", "target": target, "passes": [{"calibrate": {"samples": 256}}, "ziplm"]},
        "seconds": 588.0,
        "baseline": {
            "parameters": 22_700_000,
            "bytes": 90_900_000,
            "milliseconds": 28.4,
            "timing": {"low": 28.1, "high": 28.7, "quantised": False},
            "quality": {"cosine": 1.0, "spearman": 0.8203},
            "quality_interval": {"cosine": None, "spearman": [0.80, 0.84]},
        },
        "branches": list(branches),
        **more,
    }


def single() -> dict[str, Any]:
    return report(branch("2x", 2.0, 2.03))


def missed() -> dict[str, Any]:
    rejected = branch("4x", 4.0, 3.71, cause="the fastest model the database holds is 3.74x")
    rejected["steps"][2] |= {"kept": False, "reason": "cosine on validation fell; the weights before it were taken"}
    rejected["timing"] |= {"quantised": True, "waited": 0.31, "crowded": True}
    return report(branch("1.5x", 1.5, 1.52), branch("2x", 2.0, 2.03), branch("3x", 3.0, 3.02), rejected)


def beyond() -> dict[str, Any]:
    gone = {"reason": "a speed-up of 9x is out of reach on this target; the fastest sizes measure 3.1x", "fastest": 3.1}
    return report(branch("2x", 2.0, 2.03), out_of_reach=[{"name": "9x", **gone}, {"name": "12x", **gone}])


def rivals() -> dict[str, Any]:
    names = ("ziplm-2x", "magnitude-2x", "random-2x", "uniform-rate-of-all-layers-2x")
    return report(*(branch(name, 2.0, 2.0 + 0.01 * place) for place, name in enumerate(names)))


def decoder() -> dict[str, Any]:
    def told(name: str, promised: float, measured: float) -> dict[str, Any]:
        scores = {"quality": {"perplexity": 14.2}, "quality_interval": {"perplexity": [13.9, 14.6]}}
        before = {"quality_before_recovery": {"perplexity": 31.0}, "quality_before_recovery_interval": {}}
        shared = {"name": "hidden", "kind": "columns", "block": "", "dense": 4096, "kept": list(range(0, 4096, 2))}
        return branch(
            name, promised, measured, axes=[*axes("model.layers", 30, 32, 11008, 0.6), shared], **scores, **before
        )

    made = report(told("1.5x", 1.5, 1.51), told("2x", 2.0, 2.02))
    made["plan"]["model"] = "models/decoder"
    made["baseline"] |= {"quality": {"perplexity": 12.4}, "quality_interval": {}, "parameters": 6_740_000_000}
    return made


def finetuned() -> dict[str, Any]:
    tuned = branch(
        "model", None, None, quality={"accuracy": 0.912}, quality_interval={"accuracy": [0.89, 0.93]}, axes=[]
    )
    tuned |= {"quality_other": {"accuracy": 0.701}, "quality_other_interval": {"accuracy": [0.68, 0.72]}}
    tuned |= {"layers": {"encoder.layer.0": 0.9871, "encoder.layer.1": None}}
    tuned |= {"quality_before_recovery": {}, "quality_before_recovery_interval": {}, "steps": tuned["steps"][2:]}
    tuned["steps"][0] |= {
        "pass": "finetune",
        "reason": "accuracy on validation rose from 0.51 to 0.91",
        "seconds": 533.0,
    }
    made = report(tuned)
    made["baseline"] |= {"quality": {"accuracy": 0.51}, "quality_interval": {}}
    return made


def hostile() -> dict[str, Any]:
    bad = "<script>alert('x')</script> | `a` & \"b\""
    made = report(branch(bad, 2.0, 1.2, cause=bad))
    made["plan"]["model"], made["environment"]["cpu"] = f"models/{bad}", bad
    step, axis = made["branches"][0]["steps"][1], made["branches"][0]["axes"][0]
    step |= {"pass": bad, "reason": bad, "options": {bad: bad}, "figures": {"skipped": {bad: bad}}}
    axis |= {"name": bad, "block": bad}
    made["branches"][0]["quality"][bad] = 0.5
    made["branches"][0]["artifacts"][0]["path"] = bad
    return made


CASES = {made.__name__: made for made in (single, missed, beyond, rivals, decoder, finetuned, hostile)}


class Page(HTMLParser):
    """Collects what a browser would see: tags in order, attributes, and whether every tag is closed."""

    void = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rendered(made: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str, str]:
    render(made, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    told = [(folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("json", "md", "html")]
    return json.loads(told[0]), told[1], told[2]


def contained(part: Any, whole: Any) -> bool:
    """Whether `whole` says all that `part` says; it may say more."""
    if isinstance(part, dict):
        return all(key in whole and contained(value, whole[key]) for key, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(contained, part, whole))
    return part == whole


@pytest.mark.parametrize("case", CASES)
def test_json_holds_all_that_was_told_and_reads_back_the_same(case: str, tmp_path: Path) -> None:
    made = CASES[case]()
    told, _, _ = rendered(made, tmp_path)
    assert contained(made, told)
    assert check(told) == check(made)


@pytest.mark.parametrize("case", CASES)
def test_page_is_whole_and_needs_no_network_and_no_script(case: str, tmp_path: Path) -> None:
    _, _, text = rendered(CASES[case](), tmp_path)
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(str(link).startswith("#") for link in links)
    assert not re.search(r"@import|url\(|https?:", text)
    assert len(text) < 600_000


@pytest.mark.parametrize("case", CASES)
def test_page_and_text_tell_the_same(case: str, tmp_path: Path) -> None:
    made = CASES[case]()
    _, text, page = rendered(made, tmp_path)
    plain = re.sub(r"\\(.)", r"\1", text).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    seen, read = Page(page).text, " ".join(plain.split())
    report = check(made)
    expected = [wording.verdict(report), wording.shape(report), *wording.omissions(report)]
    for told in report.branches:
        expected += [told.name, wording.speed(told), numbers.latency(told.milliseconds), *told.quality]
        expected += [one.sha256 for one in told.artifacts] + [one.reason for one in told.steps if one.reason]
        expected += [wording.elsewhere(told, name) for name in told.quality_other]
        expected += [value for blocks in wording.layers(told).values() for value in blocks.values()]
    expected += [word for one in report.out_of_reach for word in (one.name, wording.limit(one), one.reason)]
    for words in expected:
        assert words in seen
        assert words in read


def test_how_alike_the_blocks_are_takes_a_line_of_text_and_a_picture_a_stack(tmp_path: Path) -> None:
    made = finetuned()
    made["branches"][0]["layers"] |= {"decoder.layer.0": 0.5}
    _, text, page = rendered(made, tmp_path)
    (told,) = [line for line in text.splitlines() if "CKA" in line]
    assert "encoder.layer 0: 0.9871, 1: constant; decoder.layer 0: 0.5000." in told
    assert page.count('class="alike"') == 2
    assert 'aria-label="decoder.layer.0: 0.5000"' in page


def test_hostile_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    made = hostile()
    _, text, page = rendered(made, tmp_path)
    assert "<script" not in page
    assert "<script" not in text.split("## Plan")[0]
    assert made["branches"][0]["name"] in Page(page).text
    assert "| \\<" not in text
    assert "\\`a\\`" in text


VERDICTS = {
    "single": "2x promised, 2.03x [2.01, 2.05] measured on ONNX Runtime CPU: met.",
    "missed": "3 of 4 promised speed-ups met on ONNX Runtime CPU; missed: 4x (3.71x [3.67, 3.75]).",
    "finetuned": "No speed-up was promised: model not measured on ONNX Runtime CPU, "
    "accuracy 0.9120 [0.8900, 0.9300], dense 0.5100.",
    "beyond": "1 of 3 promised speed-ups met on ONNX Runtime CPU; missed: 9x (out of reach, 3.10x at most), "
    "12x (out of reach, 3.10x at most).",
    "hostile": "2x promised, 1.20x [1.19, 1.21] measured on ONNX Runtime CPU: missed.",
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict_is_one_sentence(case: str) -> None:
    assert wording.verdict(check(CASES[case]())) == VERDICTS[case]


def test_a_verdict_on_many_names_the_first_few() -> None:
    made = missed()
    made["branches"] = [{**made["branches"][-1], "name": f"4x-{number}"} for number in range(20)]
    said = wording.verdict(check(made))
    assert said.startswith("0 of 20 promised speed-ups met on ONNX Runtime CPU; missed: 4x (3.71x")
    assert said.endswith(" and 16 more.")


def test_omissions_name_every_gap_with_its_cause() -> None:
    made = missed()
    made["branches"][0]["artifacts"][0]["worst_error"] = None
    made["branches"][1]["quality"]["spearman"] = None
    assert wording.omissions(check(made)) == [
        "1.5x: worst error of 1.5x/model not measured.",
        "ziplm skipped pooler.dense: the model's output doesn't read it.",
        "2x: quality (spearman) not measured.",
        "4x: 4x promised, 3.71x [3.67, 3.75] measured; the fastest model the database holds is 3.74x.",
        "4x: its times snap to steps, so its latency is less sure than the interval says.",
        "4x: others had the cores for 31% of the time that it was measured; measure it alone.",
        "4x: distill rejected; cosine on validation fell; the weights before it were taken.",
    ]


def test_layers_left_out_for_one_reason_are_told_together() -> None:
    made = missed()
    why = {f"layer.{number}.output": "it is tied." for number in (0, 2, 11)} | {"pooler": "it is tied.", "head": "no"}
    made["branches"][0]["steps"][1]["figures"]["skipped"] = why
    told = wording.omissions(check(made))
    assert "ziplm skipped layer.[0, 2, 11].output, pooler: it is tied." in told
    assert "ziplm skipped head: no." in told


def test_a_figure_that_rounds_to_nothing_has_no_sign() -> None:
    assert numbers.figure(-1e-9) == "0.0000"


def test_nothing_is_left_out_silently_where_all_is_absent(tmp_path: Path) -> None:
    bare = {"schema": 1, "plan": "model: here", "baseline": {}, "branches": [{"name": "only", "promised_speedup": 2.0}]}
    _, text, page = rendered(bare, tmp_path)
    for told in (text, page):
        assert "2x promised, not measured measured" not in told
        assert "only: milliseconds not measured." in told
    assert "0.00" not in Page(page).text


def test_plan_stands_as_yaml_that_reads_back(tmp_path: Path) -> None:
    made = single()
    _, text, _ = rendered(made, tmp_path)
    assert yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0]) == made["plan"]


def test_a_plan_as_text_and_the_target_that_was_met_are_read() -> None:
    made = single()
    target = made["plan"].pop("target")
    made["plan"] = yaml.safe_dump({**made["plan"], "target": {**target, "runtime": "auto"}})
    made["environment"]["target"] = {**target, "runtime": "torch"}
    read = check(made)
    assert (wording.title(read), wording.where(read)) == ("minilm", "PyTorch CPU")


def broken(where: list[Any], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(single())
    inner: Any = made
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    return made


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (["schema"], 2, "report.schema: Input should be 1"),
        (["branches", 0, "milliseconds"], float("nan"), "report.branches[0].milliseconds"),
        (["branches", 0, "artifacts", 1, "bytes"], -1, "report.branches[0].artifacts[1].bytes"),
        (["branches", 0, "axes", 3, "kept"], [7, 99999], "keeps [99999]; expected distinct units of 0..1535"),
        (["branches", 0, "axes", 3, "kept"], [7, 7], "keeps a unit twice"),
        (["plan"], "a: [b", "report.plan: Value error, not YAML"),
        (["baseline", "bytes"], Path("x"), "only JSON values can be told"),
    ],
)
def test_check_names_the_place(where: list[Any], value: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(named)):
        render(broken(where, value), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_tells_all_problems_at_once() -> None:
    made = broken(["seconds"], -1.0)
    made["branches"][0]["parameters"] = "many"
    with pytest.raises(DataError) as caught:
        check(made)
    assert len(str(caught.value).splitlines()) == 2


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    told, _, _ = rendered(single() | {"note": {"by": "a later version"}}, tmp_path)
    assert told["note"] == {"by": "a later version"}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (numbers.scaled(999, ""), "999"),
        (numbers.scaled(22_713_216, ""), "22.7 M"),
        (numbers.scaled(90_868_376, "B"), "90.9 MB"),
        (numbers.scaled(999_999, "B"), "1.00 MB"),
        (numbers.scaled(None, "B"), "not measured"),
        (numbers.duration(0.42), "0.4 s"),
        (numbers.duration(59.7), "1 min 00 s"),
        (numbers.duration(192), "3 min 12 s"),
        (numbers.duration(3840), "1 h 04 min"),
        (numbers.latency(0.4123), "0.412 ms"),
        (numbers.latency(28.44), "28.4 ms"),
        (numbers.latency(1930), "1.93 s"),
        (numbers.figure(12.345), "12.35"),
        (wording.brief(True), "yes"),
        (wording.brief(1), "1"),
        (wording.brief([1.5, 2]), "1.5, 2"),
        (wording.brief(list(range(99))), "99 values"),
    ],
)
def test_numbers_have_sensible_units(told: str, expected: str) -> None:
    assert told == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(601, "whole run: 10 min 01 s"), (11, "resumed run: 11 s; the steps took 9 min 48 s when they ran")],
)
def test_resumed_run_tells_what_it_did_not_do_again(seconds: float, expected: str, tmp_path: Path) -> None:
    _, text, page = rendered(single() | {"seconds": seconds}, tmp_path)
    assert expected in text
    assert expected in page


@pytest.mark.parametrize("dense", [1, 12, 96, 97, 1536, 11008])
def test_strip_shades_every_column_once(dense: int) -> None:
    whole = pictures.strip(dense, range(dense), "whole")
    assert whole.count("M") == min(dense, pictures.CELLS)
    assert 'fill-opacity="1"' in whole
    assert "<path" not in pictures.strip(dense, [], "gone")
    assert pictures.strip(dense, [dense - 1], "last").count("M") == 1


def test_heads_fill_those_that_survived() -> None:
    drawn = pictures.heads(32, [0, 5, 31], "heads")
    assert drawn.count('class="on"') == 3
    assert drawn.count('class="off"') == 29


@pytest.mark.parametrize("values", [[1.0], [0.0], [0.42, 0.95], [12.0, 1e6], [-1.0, 1.0]])
def test_scale_holds_its_values_and_has_ticks_on_it(values: list[float]) -> None:
    scale = pictures.scale(values, 100, 6)
    assert all(0 < scale(value) < 100 for value in values)
    assert 1 <= len(scale.ticks) <= 7
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)


def test_quality_far_off_before_recovery_does_not_squash_the_results() -> None:
    near = [pictures.Point("a", 1.0, 12.0), pictures.Point("b", 2.0, 14.0)]
    far = [near[0], pictures.Point("b", 2.0, 14.0, before=1e6)]
    assert max(pictures.heights(far)) < 40
    assert pictures.heights(near) == [12.0, 14.0]


def test_a_failed_page_leaves_the_old_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render(single(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(report: Any) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr("compress.report.page", fail)
    with pytest.raises(RuntimeError, match="no page"):
        render(missed(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
