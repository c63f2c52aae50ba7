"""SST-2: MiniLM-L6 with everything at once against dense float32: fewer words, narrower layers, int8, all distilled.

    python -m benchmarks.compound.encoder [--data DATA] [--model DENSE] [--steps 1000] [--speedups 2 3 ...]

`--data` is a folder with sst2/train.tsv and sst2/dev.tsv of GLUE (gluebenchmark.com); HF_COMPRESS_DATA is its default.
`--model` is one that is fine-tuned already. Tokens that no text uses are dropped, ZipLM prunes from one speed-up to the
next with recovery between, and each model is then trained on the grid of its int8 artifact. What is to be claimed is
chosen by accuracy on a split of train, and dev is only reported on. Artifacts of one runtime are timed in turn in one
process, on one thread, beside the dense model in its own precisions. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import folder_of, options, record
from benchmarks.recovery.encoder import TASK, data, framed, tuned
from compress import Target, compress
from compress.checkpoint import load
from compress.data import Data, DataOptions
from compress.evaluate import evaluate
from compress.evaluate.opened import Opened
from compress.measure import Timing, apart, measure, speedup
from compress.runtimes import open_artifact, runtime_of

SPEEDUPS = (2, 3, 4, 5, 6, 8, 10, 13, 17)  # of the structure alone, before int8
LOSSES = {"hidden": 1, "logits": {"weight": 1, "temperature": 2}}
EXPORTS = {"onnx": ("none", "int8_static", "int8_dynamic"), "openvino": ("none", "int8")}
BATCHES = (1, 32)


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """The dense model, and beside it one that goes from speed-up to speed-up, each trained on its grid in the end."""
    start, after = tuned(given)
    recovery = {"steps": given.steps, "learning_rate": 1e-4, "losses": LOSSES, "validate_every": given.steps // 4}
    stage = [
        {"calibrate": {"samples": 512}},
        {"ziplm": {"search": "spdy", "search_trials": 25}},
        {"distill": recovery},
    ]
    grid = {"steps": given.grid_steps, "learning_rate": 5e-5, "qat": {}, "validate_every": given.grid_steps // 2}
    passes = [
        *start,
        {"calibrate": {}, "id": "dense", "after": after},
        {"vocabulary": {}, "after": after},
        {"gradual": {"speedups": given.speedups, "passes": stage}},
        {"distill": {**recovery, **grid}},
    ]
    exports = [{kind: {"quantize": precision}} for kind, precisions in EXPORTS.items() for precision in precisions]
    return {**framed(given, passes), "export": ["huggingface", *exports]}


def rows_of(branch: dict[str, Any], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each artifact of a branch is by itself, with its accuracy on the split that choices are made by."""
    model, tokenizer = load(folder_of(branch, "huggingface"), TASK)
    texts = Data.open(DataOptions.model_validate(data(given.data)), tokenizer, TASK)
    for artifact in branch["artifacts"]:
        if artifact["kind"] == "huggingface":
            continue
        opened = Opened(open_artifact(Path(artifact["path"]), Target()), model.config)
        yield {
            "model": branch["name"],
            "structure": branch["promised_speedup"] or 1,
            "runtime": runtime_of(Path(artifact["path"])).name,
            **{key: artifact[key] for key in ("path", "precision", "bytes")},
            "accuracy": artifact["quality"]["accuracy"],
            "accuracy_interval": artifact["quality_interval"]["accuracy"],
            "validation_accuracy": evaluate(opened, texts, TASK, split="validation")["accuracy"].value,
        }


def timed(rows: list[dict[str, Any]], batch: int) -> Iterator[dict[str, Any]]:
    """Each row's time, and how many times faster it is than the first; those of another runtime, of another process."""
    times: dict[Path, Timing] = {}
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        paths = [Path(row["path"]) for row in rows if row["runtime"] == runtime]
        target = Target(runtime=runtime, batch=batch, sequence=128)
        times |= zip(paths, measure(paths, target, seconds=120.0), strict=True)
    dense = times[Path(rows[0]["path"])]
    for row in rows:
        found, compared = times[Path(row["path"])], speedup if row["runtime"] == rows[0]["runtime"] else apart
        yield {"milliseconds": found.milliseconds, "speedup": list(compared(dense, found))}


def main() -> None:
    """Run the plan and write results/compound-encoder.json."""
    parser = options(__doc__, "compound", tuned=True)
    parser.add_argument("--steps", type=int, default=1000, help="of recovery, for each speed-up")
    parser.add_argument("--grid-steps", type=int, default=400, help="of training on the grid, for each model")
    parser.add_argument("--speedups", type=float, nargs="+", default=SPEEDUPS, help="of the structure alone")
    given = parser.parse_args()
    report = compress(plan=plan(given), out=given.out).report
    rows = [row for branch in report["branches"] for row in rows_of(branch, given)]
    for batch in BATCHES:
        for row, found in zip(rows, timed(rows, batch), strict=True):
            row[f"batch_{batch}"] = found
    for row in rows:
        del row["path"]
    record("compound-encoder", {"steps": given.steps, "grid_steps": given.grid_steps, "rows": rows})


if __name__ == "__main__":
    main()
