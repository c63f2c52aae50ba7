"""SST-2: four ways to prune a fine-tuned MiniLM-L6 to four speeds, each recovered with the same budget, in one run.

    python -m benchmarks.sst2 [--data DATA] [--out out/sst2]

`--data` is a folder with sst2/train.tsv and sst2/dev.tsv of GLUE (gluebenchmark.com); HF_COMPRESS_DATA is its default.
A killed run goes on where it was. Sizes and steps are chosen on splits of train; dev is only reported on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.harness import record
from compress import compress

PLAN = Path(__file__).parent / "sst2.yaml"


def main() -> None:
    """Run the plan and write results/sst2.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_COMPRESS_DATA"))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/sst2"))
    given = parser.parse_args()
    if given.data is None:
        parser.error("expected --data or HF_COMPRESS_DATA")
    folder = Path(given.data) / "sst2"
    sources = [f"data.source={folder / 'train.tsv'}", f"data.test={folder / 'dev.tsv'}"]
    report = compress(plan=PLAN, out=given.out, overrides=sources).report
    rows = []
    for branch in report["branches"]:
        rows.append(
            {
                "method": branch["name"].split("/")[0],
                **{key: branch[key] for key in ("promised_speedup", "measured_speedup", "measured_low")},
                "measured_high": branch["measured_high"],
                "accuracy_before": branch["quality_before_recovery"]["accuracy"],
                "accuracy": branch["quality"]["accuracy"],
                "accuracy_interval": branch["quality_interval"]["accuracy"],
                "seconds": {step["pass"]: step["seconds"] for step in branch["steps"]},
            }
        )
    baseline = report["baseline"]
    dense = {"dense_accuracy": baseline["quality"]["accuracy"], "dense_milliseconds": baseline["milliseconds"]}
    record("sst2", {**dense, "branches": rows})


if __name__ == "__main__":
    main()
