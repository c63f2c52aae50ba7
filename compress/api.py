"""The one call: compress a model to a measured speed-up, or run a whole plan."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compress as package
from compress.contract import Options
from compress.data import DataOptions
from compress.errors import DataError, PlanError
from compress.plan import Plan, Tables
from compress.progress import console, hushed, say
from compress.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.runtimes import Artifact

GIVEN = "given"  # where a model handed over in memory is written, inside the run's cache


@dataclass(frozen=True)
class Result:
    """What a run made: the report as in report.json, and the folder that holds everything."""

    report: dict[str, Any]
    folder: Path

    @property
    def artifacts(self) -> list[Artifact]:
        """Everything that was exported, branch by branch."""
        from compress.runtimes import Artifact

        return [Artifact.told(artifact) for branch in self.report["branches"] for artifact in branch["artifacts"]]

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The compressed model of each branch by its name, loaded from its model folder."""
        from compress.checkpoint import load
        from compress.tasks import TASKS

        task, found = TASKS[self.report["task"]], {}
        for branch in self.report["branches"]:
            folders = [item["path"] for item in branch["artifacts"] if item["kind"] == "huggingface"]
            if folders:
                found[branch["name"]] = load(folders[0], task)[0]
        return found

    @property
    def model(self) -> PreTrainedModel | None:
        """The compressed model, that of the first branch where there are several."""
        return next(iter(self.models.values()), None)


def compress(
    model: str | Path | PreTrainedModel | None = None,
    *,
    speedup: float | Sequence[float] | None = None,
    plan: str | Path | Mapping[str, Any] | Plan | None = None,
    data: str | Path | Mapping[str, Any] | DataOptions | None = None,
    target: Mapping[str, Any] | Target | None = None,
    task: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    overrides: Sequence[str] = (),
) -> Result:
    """Compress `model` to `speedup` times its speed on `target`, or run `plan`; write everything below `out`.

    Args:
        model: a folder, a hub name or a model in memory; takes the place of the plan's own.
        speedup: one number or several, at least 1; several give a branch each. Stands for the plan calibrate, ziplm,
            distill.
        plan: a YAML file, its text, its values, or a Plan.
        data: a file, a `datasets` name or options; the built-in English where nothing is said.
        target: device, runtime, batch, sequence and threads that the speed-up is measured on.
        task: the task's name on the hub; told from the model's config where it is left out.
        tokenizer: that of a model in memory; looked for where the model came from if it is left out.
        out: folder for models, artifacts and the report; ``out`` if neither this nor the plan names one.
        resume: go on from what an earlier run left in `out`; otherwise that is removed first.
        overrides: values of the plan to change, such as ``target.threads=2``.

    Raises:
        PlanError: with every problem that can be known before a weight is loaded.
        CompressError: for anything else the caller can mend, such as a speed-up that is out of reach; where others
            of several are not, these are made, and the report tells of it.
    """
    from compress.outcome import outcome
    from compress.processes import gather, leads
    from compress.report import render
    from compress.runner import CACHE, Run, prepare
    from exporters import EXPORTERS
    from passes import PASSES

    package.check_installation()
    console.quiet = not leads()  # of several processes one tells how far they are
    started = time.monotonic()
    if (plan is None) == (speedup is None):
        raise PlanError(["compress(): expected either plan= or speedup="])
    in_memory = None if model is None or isinstance(model, str | Path) else model
    if plan is None:
        plan = {"passes": ["calibrate", {"ziplm": {"speedups": _several(speedup)}}, "distill"]}
    said = {
        "model": in_memory.name_or_path if in_memory is not None else model,
        "data": {"source": str(data)} if isinstance(data, str | Path) else data,
        "target": target,
        "task": task,
        "out": out,
    }
    read = Plan.read(
        plan.written() if isinstance(plan, Plan) else plan,
        Tables(PASSES, EXPORTERS),
        [*overrides, *(f"{key}={_yaml(value)}" for key, value in said.items() if value is not None)],
    )
    folder = Path(read.out or "out").expanduser()
    if in_memory is not None:
        if leads():
            _hand_over(in_memory, tokenizer, prepare(folder, not resume) / GIVEN)
        gather()
        read = read.model_copy(update={"model": str(folder / CACHE / GIVEN)})
    read = read.model_copy(update={"out": str(folder)})
    if problems := read.check():
        raise PlanError(problems)
    cache = prepare(folder, fresh=not resume and in_memory is None) if leads() else folder / CACHE
    gather()
    run = Run(read, cache)
    with hushed():
        leaves = run.go()
        if leads():
            say(render(outcome(run, leaves, folder, started), folder))
    gather()
    return Result(json.loads((folder / "report.json").read_text()), folder)


def _several(speedup: float | Sequence[float] | None) -> list[float]:
    """One speed-up or several as a list."""
    return [float(one) for one in (speedup if isinstance(speedup, Sequence) else [speedup]) if one is not None]


def _yaml(value: Any) -> str:
    """A value as it would stand in a plan; JSON is YAML."""
    plain = value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, Options) else value
    return json.dumps(str(plain) if isinstance(plain, Path) else plain)


def _hand_over(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a model from memory to `folder`, with the tokenizer given or the one from where the model came from."""
    from transformers import AutoTokenizer

    from compress.checkpoint import save

    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        except (OSError, ValueError) as error:
            raise DataError("compress(): the model in memory brings no tokenizer; expected tokenizer=") from error
    save(model, folder, tokenizer)
