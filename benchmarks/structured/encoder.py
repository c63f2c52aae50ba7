"""SST-2: a fine-tuned MiniLM-L6 pruned by several ways to several speeds, each recovered with the same budget.

    python -m benchmarks.structured.encoder [--data DATA] [--out out/encoder]

`--data` is a folder with sst2/train.tsv and sst2/dev.tsv of GLUE (gluebenchmark.com); HF_COMPRESS_DATA is its default.
A killed run goes on where it was. Sizes and steps are chosen on splits of train; dev is only reported on. A gradual
row has been recovered once for each speed-up up to its own. Needs the extra `bench`, for a peer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import options, record
from benchmarks.structured.peers import TorchPruning
from compress import Target, compress
from compress.measure import measure, speedup
from passes import PASSES

PLAN = Path(__file__).parent / "encoder.yaml"
LARGE_BATCH = 32


def row_of(branch: dict[str, Any]) -> dict[str, Any]:
    """The figures of one branch."""
    trained = sum(step["figures"].get("steps", 0) for step in branch["steps"] if step["pass"] == "distill")
    name, _, promised = branch["name"].partition("/")
    return {
        "method": name if promised else name.rpartition("-")[0],
        **{key: branch[key] for key in ("promised_speedup", "measured_speedup", "measured_low", "measured_high")},
        "parameters": branch["parameters"],
        "accuracy_before": branch["quality_before_recovery"]["accuracy"],
        "accuracy": branch["quality"]["accuracy"],
        "accuracy_interval": branch["quality_interval"]["accuracy"],
        "recovery_steps": trained,
        "seconds": {step["pass"]: step["seconds"] for step in branch["steps"]},
    }


def large_batch(out: Path, report: dict[str, Any]) -> list[dict[str, float]]:
    """How many times faster each branch is than the dense model at a batch of 32, which it was not pruned for."""
    dense = next((out / ".cache" / "dense").iterdir())
    artifacts = [Path(item["path"]) for branch in report["branches"] for item in branch["artifacts"]]
    target = Target(runtime="onnxruntime", batch=LARGE_BATCH, sequence=128)
    first, *others = measure([dense, *artifacts], target, seconds=120.0)
    return [speedup(first, other)._asdict() for other in others]


def main() -> None:
    """Run the plan and write results/structured-encoder.json."""
    parser = options(__doc__, "encoder")
    given = parser.parse_args()
    PASSES["torch_pruning"] = TorchPruning
    folder = given.data / "sst2"
    sources = [f"data.source={folder / 'train.tsv'}", f"data.test={folder / 'dev.tsv'}"]
    report = compress(plan=PLAN, out=given.out, overrides=sources).report
    rows = [row_of(branch) for branch in report["branches"]]
    for row, found in zip(rows, large_batch(given.out, report), strict=True):
        row["batch_32"] = found
    baseline = report["baseline"]
    dense = {"dense_accuracy": baseline["quality"]["accuracy"], "dense_milliseconds": baseline["milliseconds"]}
    record("structured-encoder", {**dense, "branches": rows})


if __name__ == "__main__":
    main()
