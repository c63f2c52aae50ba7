"""SST-2 end to end: MiniLM-L6 with zeros in runs of four, packed, in stock ONNX Runtime against dense float32 and int8.

    python -m benchmarks.sparse.packed [--data DATA] [--model DENSE] [--steps 200] [--out out/benchmarks/sparse-encoder]

The models are those of benchmarks.sparse.encoder whose zeros lie in runs of four, taken from its folder where they are
there already. All artifacts are timed in turn in one process, on one thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import folder_of, options, record
from benchmarks.sparse import encoder
from compress import Target, compress
from compress.measure import measure, speedup
from compress.plan import Plan, Tables
from compress.runner import Run
from exporters import EXPORTERS
from passes import PASSES

WAY = "SquareHead, blocks of 4"
SHAPES = ((1, 128), (32, 128), (1, 32))  # batch and sequence


def main() -> None:
    """Pack every stage's model and write results/sparse-packed.json."""
    parser = options(__doc__, "sparse-encoder", tuned=True)
    parser.add_argument("--steps", type=int, default=200, help="of recovery, for each stage")
    given = parser.parse_args()
    given.ways = [WAY]
    plan = encoder.plan(given)
    plan["passes"].append({"pack": {"format": "blocks"}, "id": "packed", "after": encoder.slug(WAY)})
    plan["export"] = ["huggingface", "onnx"]
    report = compress(plan=plan, out=given.out).report
    run = Run(Plan.read(plan, Tables(PASSES, EXPORTERS)), given.out / ".cache")
    folders = {
        "dense, float32": run.state(None).dense_artifact(),
        "dense, int8": given.out / "dense-int8",
        **{branch["name"]: Path(folder_of(branch, "onnx")) for branch in report["branches"]},
    }
    EXPORTERS["onnx"](quantize="int8_dynamic").run(run.state(None), folders["dense, int8"])
    rows: dict[str, dict[str, Any]] = {name: {"model": name, "timings": {}} for name in folders}
    for batch, sequence in SHAPES:
        target = Target(runtime="onnxruntime", batch=batch, sequence=sequence)
        first, *others = measure(list(folders.values()), target, seconds=60.0)
        for row, timing in zip(rows.values(), [first, *others], strict=True):
            found = {"milliseconds": timing.milliseconds, "speedup": speedup(first, timing)._asdict()}
            row["timings"][f"{batch}x{sequence}"] = found
    rows["dense, float32"]["accuracy"] = report["baseline"]["quality"]["accuracy"]
    for branch in report["branches"]:
        layers = branch["steps"][-1]["figures"]["layers"].values()
        rows[branch["name"]] |= {
            "accuracy": branch["quality"]["accuracy"],
            "layers": len(layers),
            "packed": sum(one["packed"] for one in layers),
        }
    record("sparse-packed", {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
