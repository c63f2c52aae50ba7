"""SmolLM2-135M on WikiText-2 with 10, 20 and 30 % fewer parameters by several ways, each recovered for as many tokens.

    python -m benchmarks.structured.decoder --model MODEL [--shares 0.2 ...] [--ways ziplm ...] [--data DATA]

`--model` is a folder with SmolLM2-135M-Instruct. `--data` holds wikitext2/wiki.{train,test}.tokens and
text/tinyshakespeare.txt, the held-out corpus of another kind; HF_COMPRESS_DATA is its default. Parameters are those
outside of embeddings and head. A killed run goes on where it was, and shares can be added to a run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.harness import record
from compress import Target, compress
from compress.checkpoint import load
from compress.data import Data, DataOptions
from compress.evaluate import evaluate
from compress.measure import measure, speedup
from compress.tasks import TASKS

TASK = TASKS["text-generation"]
BLOCKS = 30
LENGTH, TEST_ROWS = 256, 40
RECOVERY = {"steps": 40, "batch_size": 4, "learning_rate": 2e-4, "losses": {"logits": 1.0}, "validation_rows": 16}
SAMPLES = {"samples": 32, "batch_size": 8}


def ways(share: float) -> dict[str, dict[str, Any]]:
    """Each way's pass that takes away a share of the parameters, trained by nothing but the recovery that follows."""
    count, left = round(share * BLOCKS), round(1 - share, 6)
    return {
        "ziplm": {"ziplm": {"parameters": left}},
        "minitron": {"minitron": {"parameters": left, "candidates": 1, "recovery_steps": 0, "samples": 128}},
        "drop-greedy": {"drop_blocks": {"remove": count, "score": "greedy", "samples": 8}},
        "drop-influence": {"drop_blocks": {"remove": count, "score": "influence", "first_token": False, **SAMPLES}},
        "drop-angular": {"drop_blocks": {"remove": count, "score": "angular", **SAMPLES}},
        "fold": {"fold": {"groups": count, "cure": 0, **SAMPLES}},
        "slice": {"slice_hidden": {"parameters": left, **SAMPLES}},
        "puzzle": {"puzzle": {"parameters": left, "samples": 16}},
    }


def plan(model: str, shares: list[float], chosen: list[str], data: Path) -> dict[str, Any]:
    """The chosen ways at all shares beside one another."""
    passes: list[dict[str, Any]] = [{"calibrate": {"samples": 128, "batch_size": 8}, "id": "statistics"}]
    for share in shares:
        for way in chosen:
            step = ways(share)[way]
            name = f"{way}-{share:g}"
            passes.append({**step, "id": name, "after": ["statistics"] if way == "ziplm" else []})
            passes.append({"distill": RECOVERY, "id": f"{name}-recovered", "after": [name]})
    text = data / "wikitext2"
    return {
        "model": model,
        "task": TASK.name,
        "data": {
            "source": str(text / "wiki.train.tokens"),
            "test": str(text / "wiki.test.tokens"),
            "max_length": LENGTH,
            "test_rows": TEST_ROWS,
        },
        "target": {"runtime": "onnxruntime", "sequence": 64, "generate": 64},
        "passes": passes,
        "export": ["huggingface", "onnx"],
    }


def elsewhere(folder: str, text: Path) -> float:
    """Perplexity on the corpus of another kind."""
    model, tokenizer = load(folder, TASK)
    options = DataOptions(source=str(text), max_length=LENGTH, test_rows=TEST_ROWS)
    return evaluate(model, Data.open(options, tokenizer, TASK), TASK, split="test", batch_size=8)["perplexity"].value


def row_of(branch: dict[str, Any], text: Path) -> dict[str, Any]:
    """The figures of one branch."""
    way, _, share = branch["name"].removesuffix("-recovered").rpartition("-")
    first = branch["steps"][-2]
    return {
        "method": way,
        "share": float(share),
        "parameters": branch["parameters"],
        "perplexity_before": branch["quality_before_recovery"]["perplexity"],
        "perplexity": branch["quality"]["perplexity"],
        "perplexity_elsewhere": elsewhere(folder_of(branch, "huggingface"), text),
        "tokens_per_second": branch["tokens_per_second"],
        "seconds": {first["pass"]: first["seconds"], "distill": branch["steps"][-1]["seconds"]},
    }


def folder_of(branch: dict[str, Any], kind: str) -> str:
    """Where the branch's artifact of that kind lies."""
    return next(item["path"] for item in branch["artifacts"] if item["kind"] == kind)


def main() -> None:
    """Run the plan and write results/structured-decoder.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--ways", nargs="+", choices=list(ways(0.2)), default=list(ways(0.2)))
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_COMPRESS_DATA"))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/decoder"))
    given = parser.parse_args()
    if given.data is None:
        parser.error("expected --data or HF_COMPRESS_DATA")
    report = compress(plan=plan(given.model, given.shares, given.ways, Path(given.data)), out=given.out).report
    other = Path(given.data) / "text" / "tinyshakespeare.txt"
    rows = [row_of(branch, other) for branch in report["branches"]]
    torch_target = Target(runtime="torch", sequence=64, generate=64)
    models = [Path(given.model), *(Path(folder_of(branch, "huggingface")) for branch in report["branches"])]
    first, *others = measure(models, torch_target, seconds=240.0)
    for row, timing in zip(rows, others, strict=True):
        row["torch_tokens_per_second"] = torch_target.tokens_per_second(timing.milliseconds)
        row["torch_speedup"] = speedup(first, timing)._asdict()
    baseline = report["baseline"]
    dense = {
        "parameters": baseline["parameters"],
        "perplexity": baseline["quality"]["perplexity"],
        "perplexity_elsewhere": elsewhere(given.model, other),
        "tokens_per_second": baseline["tokens_per_second"],
        "torch_tokens_per_second": torch_target.tokens_per_second(first.milliseconds),
    }
    tokens = RECOVERY["steps"] * RECOVERY["batch_size"] * LENGTH
    record("structured-decoder", {"recovery_tokens": tokens, "dense": dense, "branches": rows})


if __name__ == "__main__":
    main()
