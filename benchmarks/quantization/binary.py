"""SST-2: MiniLM-L6 in one bit a weight, its activations in four bits or one, by BiT and BiBERT.

    python -m benchmarks.quantization.binary [--data DATA] [--model DENSE] [--steps 1000] [--ways ...]

`--data` is a folder with sst2/train.tsv and sst2/dev.tsv of GLUE (gluebenchmark.com); HF_COMPRESS_DATA is its default.
`--model` is one that is fine-tuned already. Each stage of activations is trained for as many steps. Sizes and
operations are counted, and nothing is claimed of speed. A killed run goes on where it was, and ways can be added.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness import options, record
from benchmarks.recovery.encoder import framed, tuned
from compress import compress

WAYS: dict[str, dict[str, Any]] = {
    "BiT W1A4": {"method": "bit", "stages": [4]},
    "BiT W1A1": {"method": "bit", "stages": [4, 2, 1]},
    "BiBERT W1A1": {"method": "bibert"},
}


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """One fine-tuned model, made binary in every way."""
    start, after = tuned(given)
    recipe = {"steps": given.steps, "learning_rate": 5e-4, "validate_every": given.steps // 4}
    ways = [{"binarize": {**WAYS[name], **recipe}, "id": name.replace(" ", "-"), "after": after} for name in given.ways]
    target = {"device": "cpu", "runtime": "torch", "batch": 1, "sequence": 64, "threads": 1}
    return {**framed(given, [*start, *ways]), "target": target}


def main() -> None:
    """Run the plan and write results/quantization-binary.json."""
    parser = options(__doc__, "binary", tuned=True)
    parser.add_argument("--steps", type=int, default=1000, help="of training, for each stage")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = parser.parse_args()
    report = compress(plan=plan(given), out=given.out).report
    rows = []
    for branch in report["branches"]:
        step = branch["steps"][-1]
        counted = ("stored_bytes", "float_operations", "bit_operations")
        rows.append(
            {
                "way": branch["name"].replace("-", " "),
                "accuracy": branch["quality"]["accuracy"],
                "interval": branch["quality_interval"]["accuracy"],
                **{key: step["figures"][key] for key in counted},
                "seconds": step["seconds"],
            }
        )
    dense = report["baseline"]["quality"]["accuracy"]
    record("quantization-binary", {"dense_accuracy": dense, "steps": given.steps, "rows": rows})


if __name__ == "__main__":
    main()
