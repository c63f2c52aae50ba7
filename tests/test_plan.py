"""Plans: reading with lines, the graph, every kind of mistake told with its place, and back to YAML."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from pydantic import ValidationError, field_validator

from compress.contract import STATISTICS, TEACHER, Fact, Options, Part, Pass
from compress.errors import PlanError
from compress.plan import Gradual, Plan, Tables, explain, leaves, mermaid, schema


class Measure(Pass):
    samples: int = 8
    rate: float = 0.1
    note: str = ""
    provides: ClassVar[frozenset[Fact]] = frozenset({STATISTICS})


class Cut(Pass):
    requires: ClassVar[frozenset[Fact]] = frozenset({STATISTICS, TEACHER})
    touches: ClassVar[Part] = Part.SHAPE | Part.VALUES
    speedups: tuple[float, ...] = (2.0,)
    mode: Literal["fast", "exact"] = "exact"

    @field_validator("speedups")
    @classmethod
    def _above_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for speedup in value:
            if speedup < 1:
                raise ValueError(f"{speedup} is below 1; expected numbers >= 1")
        return value

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(f"{speedup}x" for speedup in self.speedups) if len(self.speedups) > 1 else ("",)


class Train(Pass):
    touches: ClassVar[Part] = Part.VALUES
    epochs: int = 1


class TrainGently(Pass):
    touches: ClassVar[Part] = Part.VALUES
    keeps: ClassVar[frozenset[Fact]] = frozenset({STATISTICS})


class Pack(Pass):
    touches: ClassVar[Part] = Part.FORMAT


class Fork(Pass):
    touches: ClassVar[Part] = Part.VALUES

    @property
    def branches(self) -> tuple[str, ...]:
        return ("a", "b")


class Soup(Pass):
    touches: ClassVar[Part] = Part.VALUES
    merges: ClassVar[bool] = True


class Needy(Pass):
    size: int


class HuggingFace(Options):
    half: bool = False


class Onnx(Options):
    opset: int = 18


PASSES: dict[str, type[Pass]] = {
    "measure": Measure,
    "cut": Cut,
    "train": Train,
    "train_gently": TrainGently,
    "pack": Pack,
    "fork": Fork,
    "soup": Soup,
    "needy": Needy,
}
TABLES = Tables(PASSES, {"huggingface": HuggingFace, "onnx": Onnx})
SAMPLE = """\
model: {model}
passes:
  - measure: {{samples: 4}}
  - cut:
      speedups: [1.5, 2]
  - train
out: {out}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def write(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Write a plan with the given passes, behind two lines for model and out."""

    def written(passes: str, head: str = "") -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(f"model: {model}\n{head or f'out: {tmp_path}/new'}\n{passes}")
        return path

    return written


def problems(source: Any, *overrides: str) -> list[str]:
    try:
        return Plan.read(source, TABLES, overrides).check()
    except PlanError as error:
        return list(error.problems)


def steps(text: str) -> Plan:
    return Plan.read(f"model: m\npasses:\n{text}\n", TABLES)


def test_a_fit_plan_has_no_problems_and_reads_back_the_same(tmp_path: Path, model: Path) -> None:
    plan = Plan.read(SAMPLE.format(model=model, out=tmp_path / "new"), TABLES)
    assert plan.check() == []
    again = Plan.read(plan.to_yaml(), TABLES)
    assert again.model_dump() == plan.model_dump()
    assert [step.do for step in again.passes] == [Measure(samples=4), Cut(speedups=(1.5, 2)), Train()]
    assert [exporter.name for exporter in again.export] == ["huggingface", "onnx"]


def test_a_plan_written_in_python_is_the_plan_read_from_yaml(model: Path) -> None:
    read = steps(
        "  - measure: {samples: 4}\n  - cut: {speedups: [1.5, 2]}\n    id: two\n  - train: {}\n    after: [two]"
    )
    made = Plan(
        model="m",
        passes=(
            Measure(samples=4),
            {"do": Cut(speedups=(1.5, 2)), "id": "two"},
            {"do": Train(), "after": ("two",)},
        ),
        export=(HuggingFace(), Onnx()),
    )
    assert made.passes == read.passes
    assert Plan.read(made.written(), TABLES).export == read.export
    unsaid = Plan(model="m", passes=(Measure(),))
    assert [exporter.name for exporter in Plan.read(unsaid.written(), TABLES).export] == ["huggingface", "onnx"]
    assert [node.branch for node in made.nodes()] == [node.branch for node in read.nodes()]
    assert Plan.read({"model": "m", "passes": ["measure"]}, TABLES).passes[0].do == Measure()


def test_forms_of_steps() -> None:
    plan = steps(
        "  - measure\n  - measure:\n  - measure: {}\n  - train_gently:\n    id: last\n    after: []\nexport: []"
    )
    assert [step.do for step in plan.passes] == [Measure(), Measure(), Measure(), TrainGently()]
    assert (plan.passes[3].id, plan.passes[3].after, plan.export) == ("last", (), ())
    assert Plan.read(plan.to_yaml(), TABLES).passes == plan.passes


def test_numbers_written_with_exponents_are_numbers() -> None:
    assert steps("  - measure: {rate: 3e-5}").passes[0].do == Measure(rate=3e-5)


WRONG = {
    "syntax": ("passes: [measure\n", 4, ["not YAML"]),
    "tab": ("passes:\n\t- measure\n", 4, ["not YAML"]),
    "twice": ("passes: [measure]\npasses: [train]\n", 4, ["passes: stands twice", "plan.yaml:3"]),
    "unknown key": ("passes: [measure]\npases: []\n", 4, ["pases: unknown key", "did you mean 'passes'"]),
    "empty": ("passes: []\n", 3, ["passes: there is none; expected a list with at least one pass"]),
    "not a list": ("passes: measure\n", 3, ["passes: met 'measure'; expected a list"]),
    "unknown pass": ("passes:\n  - mesure\n", 4, ["passes[0].mesure: unknown pass", "did you mean 'measure'"]),
    "unknown option": (
        "passes:\n  - measure:\n      sample: 3\n",
        5,
        ["passes[0].measure.sample: unknown option; expected one of samples, rate", "did you mean 'samples'"],
    ),
    "own validator": (
        "passes:\n  - measure\n  - cut:\n      speedups:\n      - 2\n      - 0.5\n",
        6,
        ["passes[1].cut.speedups: 0.5 is below 1; expected numbers >= 1"],
    ),
    "choice": (
        "passes:\n  - measure\n  - cut:\n      mode: exat\n",
        6,
        ["passes[1].cut.mode: met 'exat'; expected 'fast' or 'exact'", "did you mean 'exact'"],
    ),
    "bounds": ("passes: [measure]\ntarget: {batch: 0}\n", 4, ["met 0; expected a number greater than or equal to 1"]),
    "missing option": ("passes:\n  - needy\n", 4, ["passes[0].needy.size: is missing"]),
    "wrong type": ("passes:\n  - measure: {samples: many}\n", 4, ["passes[0].measure.samples: met 'many'; expected a"]),
    "options as a word": ("passes:\n  - measure: fast\n", 4, ["passes[0].measure: met 'fast'; expected options such"]),
    "indentation": (
        "passes:\n  - measure:\n    samples: 3\n",
        5,
        ["passes[0].samples: unknown key beside the pass measure", "one level deeper"],
    ),
    "step of no name": ("passes:\n  - id: a\n", 4, ["passes[0]: names no pass; expected one of measure, cut"]),
    "step of a list": ("passes:\n  - [measure]\n", 4, ["passes[0]: met ['measure']; expected the name of a pass"]),
    "base 60": ("passes:\n  - measure: {samples: 2:4}\n", 4, ["reads a bare 2:4 in base 60", "{keep: 2, of: 4}"]),
    "tag": ("passes:\n  - measure: {samples: !!int x}\n", 4, ["samples: 'x' can't be read as int"]),
    "no for a number": ("passes:\n  - train: {epochs: no}\n", 4, ["epochs: met false", "reads a bare no as false"]),
    "off for text": ("passes:\n  - measure: {note: off}\n", 4, ["note: met false", "write 'off'"]),
    "number for text": ("passes:\n  - measure: {note: 12}\n", 4, ["note: met 12", "write '12'"]),
    "endless alias": ("passes: &a\n  - *a\n", 3, ["an alias that holds itself"]),
    "unknown exporter": ("passes: [measure]\nexport: [onx]\n", 4, ["export[0].onx: unknown exporter", "'onnx'"]),
    "gradual without a taker": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes: [train]\n",
        6,
        ["passes[0].gradual.passes: none of them takes speedups; expected one pass that does"],
    ),
    "gradual with two takers": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes: [measure, cut, measure, cut]\n",
        6,
        ["passes[0].gradual.passes: cut and cut take speedups; expected one pass that does"],
    ),
    "gradual of no passes": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes: []\n",
        6,
        ["passes[0].gradual.passes: none of them takes speedups"],
    ),
    "gradual of no list": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes: cut\n",
        6,
        ["passes[0].gradual.passes: met 'cut'; expected a list"],
    ),
    "gradual without passes": ("passes:\n  - gradual: {speedups: [2]}\n", 4, ["passes[0].gradual.passes: is missing"]),
    "gradual without speed-ups": (
        "passes:\n  - gradual: {passes: [cut]}\n",
        4,
        ["passes[0].gradual: neither speedups nor sparsities is given; expected one of them"],
    ),
    "gradual of no speed-up": (
        "passes:\n  - gradual:\n      speedups: []\n      passes: [measure, cut]\n",
        5,
        ["passes[0].gradual.speedups: met []; expected", "at least 1 item"],
    ),
    "gradual that falls": (
        "passes:\n  - gradual:\n      passes: [measure, cut]\n      speedups: [3, 2]\n",
        6,
        ["passes[0].gradual.speedups: 2 stands after 3; expected rising speed-ups"],
    ),
    "gradual twice the same": (
        "passes:\n  - gradual:\n      passes: [measure, cut]\n      speedups: [2, 2.0]\n",
        6,
        ["2 stands after 2; expected rising speed-ups"],
    ),
    "gradual with a strange option": (
        "passes:\n  - gradual:\n      speedup: 2\n      speedups: [2]\n      passes: [measure, cut]\n",
        5,
        [
            "passes[0].gradual.speedup: unknown option; expected one of speedups, sparsities, passes",
            "did you mean 'speedups'",
        ],
    ),
    "gradual with a speed-up inside": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes:\n      - measure\n      - cut:\n"
        "          speedups: [2]\n",
        9,
        ["passes[0].gradual.passes[1].cut.speedups: is the gradual step's to fill in"],
    ),
    "gradual with a wrong option inside": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes:\n      - measure:\n          sample: 1\n"
        "      - cut\n",
        8,
        ["passes[0].gradual.passes[0].measure.sample: unknown option", "did you mean 'samples'"],
    ),
    "gradual inside": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes:\n      - gradual\n      - cut\n",
        7,
        ["passes[0].gradual.passes[0].gradual: unknown pass; expected one of measure"],
    ),
    "gradual with an id inside": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes:\n      - measure\n      - {cut: , id: a}\n",
        8,
        ["passes[0].gradual.passes[1].id: unknown key beside the pass cut"],
    ),
    "gradual of several models": (
        "passes:\n  - gradual:\n      speedups: [2, 3]\n      passes:\n      - measure\n      - cut\n      - fork\n",
        9,
        ["passes[0].gradual.passes[2].fork: makes 2 models; expected passes that make one"],
    ),
    "gradual whose facts go stale": (
        "passes:\n  - measure\n  - gradual:\n      speedups: [2, 3, 4]\n      passes:\n      - cut\n      - train\n",
        8,
        [
            "passes[1].gradual.passes[0].cut: needs 'statistics'",
            "which passes[1].gradual.passes[0].cut makes stale for the next target; expected measure in the",
        ],
    ),
    "gradual that packs": (
        "passes:\n  - gradual:\n      speedups: [2, 3, 4]\n      passes: [measure, cut, pack]\n",
        6,
        ["passes[0].gradual.passes[1].cut: touches shape and values, but passes[0].gradual.passes[2].pack has fixed"],
    ),
    "gradual misspelt": ("passes:\n  - gradul: {}\n", 4, ["unknown pass", "did you mean 'gradual'"]),
    "unknown runtime": (
        "passes: [measure]\ntarget: {runtime: onnxruntme}\n",
        4,
        ["target.runtime: met 'onnxruntme'", "did you mean 'onnxruntime'"],
    ),
    "unknown task": ("passes: [measure]\ntask: fil-mask\n", 4, ["task: unknown task", "did you mean 'fill-mask'"]),
    "data of nowhere": ("passes: [measure]\ndata:\n  source: ./none.txt\n", 5, ["data.source: ", "none.txt"]),
    "duplicate id": (
        "passes:\n  - {measure: , id: a}\n  - {train: , id: a}\n",
        5,
        ["passes[1].id: 'a' is the id of passes[0].measure already"],
    ),
    "id that is no word": ("passes:\n  - {measure: , id: ../a}\n", 4, ["passes[0].id: met '../a'; expected letters"]),
    "id of a wrong type": ("passes:\n  - {measure: , id: 3}\n", 4, ["passes[0].id: met 3; expected a name"]),
    "unknown after": (
        "passes:\n  - measure\n  - {train: , after: mesure}\n",
        5,
        ["passes[1].after: 'mesure' is no step", "did you mean 'measure'"],
    ),
    "after itself": ("passes:\n  - {train: , after: train}\n", 4, ["passes[0].after: 'train' is this very step"]),
    "after a later step": (
        "passes:\n  - {train: , after: pack}\n  - {pack: , after: []}\n",
        4,
        ["passes[0].after: 'pack' stands later in the plan; expected an earlier step"],
    ),
    "cycle": (
        "passes:\n  - {train: , after: pack}\n  - {pack: , after: train}\n",
        4,
        ["passes[0].after: 'pack' stands later in the plan, which in turn follows it, a cycle"],
    ),
    "ambiguous after": (
        "passes:\n  - train\n  - train\n  - {pack: , after: train}\n",
        6,
        ["passes[2].after: 'train' stands 2 times"],
    ),
    "fact never given": (
        "passes:\n  - cut\n",
        4,
        ["passes[0].cut: needs 'statistics'", "which no step before it gives; expected measure before it"],
    ),
    "fact too late": (
        "passes:\n  - cut\n  - measure\n",
        4,
        ["passes[0].cut: needs 'statistics'", "which passes[1].measure gives too late; expected measure before it"],
    ),
    "fact gone stale": (
        "passes:\n  - measure\n  - train\n  - cut\n",
        6,
        [
            "passes[2].cut: needs",
            "which passes[1].train has made stale; expected measure again between passes[1].train",
        ],
    ),
    "values after format": (
        "passes:\n  - pack\n  - train\n",
        5,
        ["passes[1].train: touches values, but passes[0].pack has fixed the number format; expected it before passes"],
    ),
    "shape after format": (
        "passes:\n  - measure\n  - pack\n  - cut\n",
        6,
        ["passes[2].cut: touches shape and values, but passes[1].pack"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_mistake_is_one_line_at_its_place(case: str, write: Callable[..., Path]) -> None:
    text, line, parts = WRONG[case]
    path = write(text)
    told = problems(path)
    assert len(told) == 1, told
    assert told[0].startswith(f"{path}:{line}: "), told
    for part in parts:
        assert part in told[0]


def test_all_problems_are_told_at_once_and_in_order(write: Callable[..., Path]) -> None:
    text = "passes:\n  - mesure\n  - train: {epochs: x}\ntarget: {threads: 0}\ndata: {source: ./none.txt}\ntask: x\n"
    told = problems(write(text))
    assert [line.split(":")[1] for line in told] == ["4", "5", "6", "7", "8"]
    graph = problems(write("passes:\n  - cut\n  - pack\n  - train\ntask: x\n"))
    assert [line.split(":")[1] for line in graph] == ["4", "6", "7"]


def test_a_missing_fact_is_told_once() -> None:
    told = problems("model: m\npasses:\n  - cut\n  - train\n  - pack\n")
    assert sum("statistics" in line for line in told) == 1


def test_what_keeps_a_fact_does_not_spoil_it() -> None:
    assert problems("model: m\npasses:\n  - measure\n  - train_gently\n  - cut\n") == []
    assert problems("model: m\npasses:\n  - measure\n  - pack\n") == []


def test_a_fact_holds_after_a_merge_only_if_it_holds_on_every_side() -> None:
    text = "model: m\npasses:\n  - measure\n  - {train_gently: , id: a}\n  - {%s: , id: b, after: measure}\n"
    merge = "  - {join: , after: [a, b]}\n  - {needs: , id: z}\n"

    class Join(Pass):
        merges: ClassVar[bool] = True

    class Needs(Pass):
        requires: ClassVar[frozenset[Fact]] = frozenset({STATISTICS})

    tables = Tables({**PASSES, "join": Join, "needs": Needs}, TABLES.exporters)
    assert Plan.read(text % "train_gently" + merge, tables).check() == []
    told = Plan.read(text % "train" + merge, tables).check()
    assert len(told) == 1
    assert "passes[4].needs: needs 'statistics'" in told[0]
    assert "passes[2].train has made stale" in told[0]


@pytest.mark.parametrize(
    ("text", "branches"),
    [
        ("  - measure\n  - train", ["", ""]),
        ("  - measure\n  - cut: {speedups: [1.5, 2]}\n  - train", ["", "1.5x", "2.0x", "1.5x", "2.0x"]),
        (
            "  - measure\n  - {cut: {speedups: [2, 3]}, id: fast}\n  - {train: , id: base, after: measure}",
            ["", "fast/2.0x", "fast/3.0x", "base"],
        ),
        (
            "  - {cut: {speedups: [2, 3]}}\n  - {train: , id: a}\n  - {pack: , id: b, after: cut}\n"
            "  - {soup: , after: [a, b]}\n  - pack",
            ["2.0x", "3.0x", "2.0x/a", "3.0x/a", "2.0x/b", "3.0x/b"] + ["2.0x/soup", "3.0x/soup"] * 2,
        ),
        (
            "  - {cut: {speedups: [2, 3]}, id: a}\n  - {cut: {speedups: [4, 5]}, id: b, after: []}\n"
            "  - {soup: , after: [a, b]}",
            ["a/2.0x", "a/3.0x", "b/4.0x", "b/5.0x"]
            + [f"{one}/{two}/soup" for one in ("2.0x", "3.0x") for two in ("4.0x", "5.0x")],
        ),
    ],
    ids=["chain", "branches", "fork", "diamond", "product"],
)
def test_nodes(text: str, branches: list[str]) -> None:
    nodes = steps(text).nodes()
    assert [node.branch for node in nodes] == branches
    made: set[Any] = set()
    for node in nodes:
        assert set(node.parents) <= made
        made.add(node)
    assert len(made) == len(nodes)


FAMILY = """\
  - train
  - gradual:
      speedups: [2, 3, 4.5]
      passes: [measure, {cut: {mode: fast}}, train_gently]
    id: family
"""


@pytest.mark.parametrize(
    ("text", "leaving"),
    [
        ("", ["2x", "3x", "4.5x"]),
        ("  - pack\n", ["2x", "3x", "4.5x"]),
        (
            "  - {train: , id: a, after: family}\n  - {pack: , id: b, after: family}\n  - {soup: , after: [a, b]}\n",
            ["2x/soup", "3x/soup", "4.5x/soup"],
        ),
        ("  - {pack: , after: []}\n", ["family/2x", "family/3x", "family/4.5x", "pack"]),
    ],
    ids=["alone", "followed", "diamond", "beside"],
)
def test_every_model_of_a_gradual_step_leaves(text: str, leaving: list[str]) -> None:
    plan = steps((FAMILY if "[]" not in text else FAMILY.replace("  - train\n", "", 1)) + text)
    nodes = plan.nodes()
    assert sorted(node.branch for node in leaves(nodes)) == sorted(leaving)
    assert len(set(nodes)) == len(nodes)


def test_a_gradual_step_is_the_chain_it_stands_for() -> None:
    plan = steps(FAMILY)
    first, *nodes = plan.nodes()
    assert [(node.number, node.step.name, node.branch) for node in nodes] == [
        ((1, place), name, branch)
        for branch in ("2x", "3x", "4.5x")
        for place, name in enumerate(("measure", "cut", "train_gently"))
    ]
    for before, after in itertools.pairwise([first, *nodes]):
        assert after.parents == (before,)
    assert [node.step.do for node in nodes if node.step.name == "cut"] == [
        Cut(speedups=(speedup,), mode="fast") for speedup in (2, 3, 4.5)
    ]
    assert [node.label for node in nodes] == ["", "", "2x", "", "", "3x", "", "", "4.5x"]
    (only,) = leaves(steps(FAMILY.replace("[2, 3, 4.5]", "[2]")).nodes())
    assert only.branch == ""


def test_a_gradual_step_reads_back_and_is_written_in_python(model: Path) -> None:
    plan = steps(FAMILY + "  - {pack: , after: family}")
    assert Plan.read(plan.to_yaml(), TABLES).passes == plan.passes
    assert yaml.safe_load(plan.to_yaml())["passes"][1] == {
        "gradual": {"speedups": [2.0, 3.0, 4.5], "passes": ["measure", {"cut": {"mode": "fast"}}, "train_gently"]},
        "id": "family",
    }
    chain = (Measure(), Cut(mode="fast"), {"do": TrainGently(), "name": "train_gently"})
    made = Plan(model="m", passes=(Train(), Gradual(speedups=(2, 3, 4.5), passes=chain, id="family")))
    assert [node.step.key_material() for node in made.nodes()] == [
        node.step.key_material() for node in plan.nodes()[:10]
    ]
    for wrong in ({"speedups": (3, 2), "passes": chain}, {"speedups": (2,), "passes": (Train(),)}):
        with pytest.raises(ValidationError, match="expected"):
            Gradual(**wrong)


@pytest.mark.parametrize(
    ("text", "leaving"),
    [
        ("", [""]),
        ("  - pack\n", [""]),
        ("  - fork\n", ["a", "b"]),
        ("  - {pack: , id: one, after: family}\n  - {train: , id: two, after: family}\n", ["one", "two"]),
    ],
    ids=["alone", "followed", "forked", "followed twice"],
)
def test_a_gradual_step_may_deliver_its_last_model_alone(text: str, leaving: list[str]) -> None:
    family = FAMILY.replace("    id:", "      deliver: last\n    id:")
    plan = steps(family + text)
    assert [node.branch for node in leaves(plan.nodes())] == leaving
    assert [node.branch for node in plan.nodes() if node.index == 1] == ["2x"] * 3 + ["3x"] * 3 + [""] * 3
    assert Plan.read(plan.to_yaml(), TABLES).passes == plan.passes
    assert plan.to_yaml().count("deliver: last") == 1
    assert "2x, then 3x, then 4.5x, which alone leaves" in explain(plan)
    assert plan.check() == steps(FAMILY + text).check()


def test_a_gradual_step_follows_every_model_before_it() -> None:
    nodes = steps("  - {fork: }\n" + FAMILY).nodes()
    assert [node.branch for node in leaves(nodes)] == [f"{one}/{two}" for two in ("2x", "3x", "4.5x") for one in "ab"]


def test_a_gradual_step_is_told() -> None:
    plan = steps(FAMILY + "  - {pack: , after: family}")
    told = explain(plan)
    for part in (
        "1 gradual (family): 2x, then 3x, then 4.5x",
        "1.0 measure\n  after   0 train, 1.2 train_gently",
        "1.2 train_gently\n  after   1.1 cut",
        "2 pack\n  after   1.2 train_gently",
        "of 2x, 3x, 4.5x",
    ):
        assert part in told
    graph = mermaid(plan)
    assert graph.count("-->") == 1 + 9 + 3 + 3 * len(plan.export)


def test_overrides_reach_into_a_gradual_step() -> None:
    settings = ["passes.1.gradual.speedups=[2, 5]", "passes.1.gradual.passes.0.measure.samples=3"]
    plan = Plan.read(f"model: m\npasses:\n{FAMILY}", TABLES, settings)
    assert [node.branch for node in leaves(plan.nodes())] == ["2x", "5x"]
    assert plan.nodes()[1].step.do == Measure(samples=3)
    told = problems(f"model: m\npasses:\n{FAMILY}", "passes.1.gradual.passes.1.cut.mode=fats")
    assert "passes[1].gradual.passes[1].cut.mode: met 'fats'" in told[0]


def test_a_pass_that_takes_one_model_follows_one_step() -> None:
    told = problems(
        "model: m\npasses:\n  - {measure: , id: a}\n  - {pack: , id: b, after: a}\n  - {measure: , after: [a, b]}\n"
    )
    assert [line.partition(": ")[2] for line in told] == [
        "passes[2].after: follows 2 steps, but measure takes one model; expected one name"
    ]


def test_a_merge_joins_models_of_the_same_branch() -> None:
    plan = steps(
        "  - {cut: {speedups: [2, 3]}}\n  - {train: , id: a}\n  - {pack: , id: b, after: cut}\n"
        "  - {soup: , after: [a, b]}"
    )
    merged = [node for node in plan.nodes() if node.step.name == "soup"]
    assert [[parent.branch for parent in node.parents] for node in merged] == [
        ["2.0x/a", "2.0x/b"],
        ["3.0x/a", "3.0x/b"],
    ]


def test_nodes_of_a_contradictory_graph_are_refused() -> None:
    with pytest.raises(PlanError, match="is no step"):
        steps("  - {train: , after: nowhere}").nodes()


def test_key_material_changes_with_options_version_and_name() -> None:
    first, second, third = steps("  - train\n  - train: {epochs: 2}\n  - train: {epochs: 1}").passes
    assert first.key_material() == third.key_material() != second.key_material()
    assert json.loads(first.key_material()) == {"name": "train", "version": 1, "options": {"epochs": 1}}


def test_overrides() -> None:
    text = "model: m\npasses:\n  - measure\n  - cut: {speedups: [2]}\n"
    plan = Plan.read(
        text, TABLES, ["passes.1.cut.speedups=[3, 4]", "passes.0.measure.rate=3e-5", "target.threads=1", "model=n"]
    )
    assert [step.do for step in plan.passes] == [Measure(rate=3e-5), Cut(speedups=(3, 4))]
    assert (plan.model, plan.target.threads) == ("n", 1)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("target.threads=none", ["target.threads: met 'none'"]),
        ("passes.1.cut.speedups=[0.5]", ["passes[1].cut.speedups: 0.5 is below 1"]),
        ("passes.7.cut.mode=fast", ["passes[7]: there is no such value to set; expected a place 0..1"]),
        ("model.deeper=1", ["model.deeper: there is no such value to set"]),
        ("target.threads=[", ["target.threads: not YAML"]),
        ("target.threads", ["expected key=value"]),
    ],
)
def test_a_bad_override_is_told_as_such(override: str, parts: list[str]) -> None:
    told = problems("model: m\npasses:\n  - measure\n  - cut\n", override)
    assert len(told) == 1, told
    assert f"given {override}" in told[0]
    for part in parts:
        assert part in told[0]


def test_model_problems(write: Callable[..., Path], model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = write("passes: [measure]\n")
    assert problems(path) == []
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in problems(path)[0]
    (model / "config.json").write_text(json.dumps({"model_type": "brt"}))
    assert problems(path)[0].startswith(f"{path}:1: model: unknown model type 'brt'")
    assert "did you mean 'bert'" in problems(path)[0]
    (model / "config.json").write_text("{")
    assert "config.json can't be read" in problems(path)[0]
    (model / "config.json").unlink()
    assert "config.json" in problems(path)[0]
    assert "model: is missing" in problems("passes:\n  - measure\n")[0]
    (model / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'encoder'" in problems({"model": "encodr", "passes": ["measure"]})[0]


def test_model_inside_a_package(tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "packed_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('found, but must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    plan = Plan(model="package:packed_model/inside", passes=(Measure(),))
    assert plan.source == str(package / "inside")
    told = problems({"model": "package:no_such_package/model", "passes": ["measure"]})
    assert len(told) == 1
    assert "pip install 'hf-compress[demo]'" in told[0]


def test_a_home_that_is_not_there(tmp_path: Path) -> None:
    told = problems({"model": "~nobody-at-all/m", "passes": ["measure"]})
    assert len(told) == 1
    assert told[0].startswith("plan: model: met ~nobody-at-all/m; expected a folder or a hub name")


def test_out_problems(tmp_path: Path, write: Callable[..., Path]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    path = write("passes: [measure]\n", head=f"out: {full}")
    assert problems(path) == []
    (full / "letter.txt").touch()
    assert problems(path) == [
        f"{path}:2: out: {full} is not empty and was not made by hf-compress; expected a new folder"
    ]
    (full / ".hf-compress").touch()
    assert problems(path) == []
    file = full / "letter.txt"
    assert "is a file" in problems(write("passes: [measure]\n", head=f"out: {file}"))[0]
    assert "is a file" in problems(write("passes: [measure]\n", head=f"out: {file}/deeper"))[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_out_that_is_closed(tmp_path: Path, write: Callable[..., Path]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "can't be written to" in problems(write("passes: [measure]\n", head=f"out: {closed}/new"))[0]


@pytest.mark.parametrize(("text", "part"), [(b"\xff\xfe\x00", "not UTF-8"), (b"passes: \x01", "not YAML")])
def test_files_that_are_no_text(tmp_path: Path, text: bytes, part: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(text)
    assert part in problems(path)[0]
    assert "can't be read" in problems(tmp_path / "none.yaml")[0]


def test_explain_names_the_contract_and_the_branches() -> None:
    plan = steps("  - measure\n  - cut: {speedups: [1.5, 2]}\n  - train")
    told = explain(plan)
    for part in (
        "1 cut",
        "needs   statistics, teacher",
        "gives   statistics",
        "spoils  grid, masks, statistics",
        "1.5x, 2.0x",
    ):
        assert part in told
    graph = mermaid(plan)
    assert graph.startswith("flowchart TD")
    assert graph.count("-->") == 5 + 2 * len(plan.export)


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        inner = set().union(*map(references, value.values())) if value else set()
        return inner | ({value["$ref"]} if "$ref" in value else set())
    return set().union(*map(references, value)) if isinstance(value, list) and value else set()


def test_schema_describes_every_pass_and_holds_all_it_refers_to() -> None:
    made = schema(TABLES)
    assert references(made) <= {f"#/$defs/{name}" for name in made["$defs"]}
    forms = made["properties"]["passes"]["items"]["anyOf"]
    assert forms[0]["enum"] == [name for name in PASSES if name != "needy"]
    assert [form["required"][0] for form in forms[1:]] == [*PASSES, "gradual"]
    inner = made["$defs"]["gradual"]["properties"]["passes"]["items"]["anyOf"]
    assert [form["required"][0] for form in inner[1:]] == list(PASSES)
    assert "speedups" not in made["$defs"]["gradual.passes.cut"]["properties"]
    assert made["$defs"]["passes.cut"]["properties"]["mode"]["enum"] == ["fast", "exact"]
    json.dumps(made)


def test_schema_agrees_with_the_reader() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the package that validates against JSON schemas")
    validator = jsonschema.Draft202012Validator(schema(TABLES))
    fit = {"model": "m", "passes": ["measure", {"cut": {"mode": "fast"}, "id": "a"}, {"train": None, "after": []}]}
    assert validator.is_valid(fit)
    assert validator.is_valid({"passes": [{"gradual": {"speedups": [2], "passes": ["cut", "train"]}, "id": "a"}]})
    for wrong in (
        {"passes": [{"gradual": {"passes": ["cut"]}}]},
        {"passes": [{"gradual": {"speedups": [2], "passes": [{"cut": {"speedups": [2]}}]}}]},
    ):
        assert not validator.is_valid(wrong)
    for wrong in ({"passes": []}, {"passes": ["needy"]}, {"passes": [{"cut": {"mod": 1}}]}, {"passes": ["x"], "y": 1}):
        assert not validator.is_valid(wrong)
