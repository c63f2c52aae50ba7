"""SST-2: MiniLM-L6 made sparse in stages by oBERT and recovered: by which losses, single weights or blocks of 4.

    python -m benchmarks.sparse.encoder [--data DATA] [--model DENSE] [--steps 200] [--ways SquareHead ...]

`--data` is a folder with sst2/train.tsv and sst2/dev.tsv of GLUE (gluebenchmark.com); HF_COMPRESS_DATA is its default.
`--model` is one that is fine-tuned already. SquareHead goes with the labels, as published. Weights are chosen and
trained on splits of train; dev is only reported on. A killed run goes on where it was, and ways can be added to a run.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness import options, record
from benchmarks.recovery.encoder import framed, tuned
from compress import compress

SPARSITIES = (0.5, 0.65, 0.75, 0.8, 0.85, 0.9)
WAYS: dict[str, tuple[int, dict[str, float]]] = {
    "SquareHead": (1, {"hidden": 1, "task": 1}),
    "SquareHead, blocks of 4": (4, {"hidden": 1, "task": 1}),
    "CE": (1, {"task": 1}),
    "KL": (1, {"logits": 1}),
}


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """One fine-tuned model, made sparse in the same stages every way."""
    start, after = tuned(given)
    ways = []
    for name in given.ways:
        block, losses = WAYS[name]
        passes = [
            {"obert": {"block": block, "gradients": 128, "recomputations": 1}},
            {"distill": {"steps": given.steps, "learning_rate": 1e-4, "losses": losses}},
        ]
        gradual = {"sparsities": list(SPARSITIES), "passes": passes}
        ways.append({"gradual": gradual, "id": slug(name), "after": after})
    return framed(given, [*start, *ways])


def slug(name: str) -> str:
    """A way's name as a step may have it."""
    return name.replace(",", "").replace(" ", "-").lower()


def main() -> None:
    """Run the plan and write results/sparse-encoder.json."""
    parser = options(__doc__, "sparse-encoder", tuned=True)
    parser.add_argument("--steps", type=int, default=200, help="of recovery, for each stage")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = parser.parse_args()
    report = compress(plan=plan(given), out=given.out).report
    names = {slug(name): name for name in given.ways}
    rows = []
    for branch in report["branches"]:
        way, _, stage = branch["name"].partition("/sparse-")
        sparse, recovered = branch["steps"][-2:]
        rows.append(
            {
                "way": names[way],
                "sparsity": float(stage),
                "zeros": recovered["figures"]["zeros"]["share"],
                "accuracy": branch["quality"]["accuracy"],
                "interval": branch["quality_interval"]["accuracy"],
                "seconds": {step["pass"]: step["seconds"] for step in (sparse, recovered)},
            }
        )
    dense = report["baseline"]["quality"]["accuracy"]
    record("sparse-encoder", {"dense_accuracy": dense, "steps": given.steps, "rows": rows})


if __name__ == "__main__":
    main()
