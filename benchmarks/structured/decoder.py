"""A decoder with fewer parameters by several ways, each recovered for as many tokens: SmolLM2-135M, or a smaller one.

    python -m benchmarks.structured.decoder --model MODEL --name smollm2 --source wikitext2/wiki.train.tokens
        --test wikitext2/wiki.test.tokens --other text/tinyshakespeare.txt [--shares 0.1 0.2 0.3] [--ways ziplm ...]
        [--steps 40]

`--model` is its folder. Texts lie below `--data`, for which HF_COMPRESS_DATA stands; without `--test` a part of the
source is held out, and `--other` is a corpus of another kind. Parameters are those outside of embeddings and head. A
killed run goes on where it was, and shares and ways can be added to a run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.harness import folder_of, options, record
from compress import Target, compress
from compress.checkpoint import load
from compress.data import Data, DataOptions
from compress.evaluate import evaluate
from compress.measure import measure, speedup
from compress.tasks import TASKS

TASK = TASKS["text-generation"]
LENGTH, TEST_ROWS = 256, 40
RECOVERY = {"batch_size": 4, "learning_rate": 2e-4, "losses": {"logits": 1.0}, "validation_rows": 16}
SAMPLES = {"samples": 32, "batch_size": 8}


def ways(share: float, blocks: int) -> dict[str, dict[str, Any]]:
    """Each way's pass that takes away a share of the parameters, trained by nothing but the recovery that follows."""
    count, left = round(share * blocks), round(1 - share, 6)
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


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """The chosen ways at all shares beside one another."""
    passes: list[dict[str, Any]] = []
    blocks = AutoConfig.from_pretrained(given.model).num_hidden_layers
    for share in given.shares:
        for way in given.ways:
            name = f"{way}-{share:g}"
            if way == "ziplm":  # each way is a branch, named after its first step
                passes.append({"calibrate": {"samples": 128, "batch_size": 8}, "id": f"{name}-statistics", "after": []})
            after = [f"{name}-statistics"] if way == "ziplm" else []
            passes.append({**ways(share, blocks)[way], "id": name, "after": after})
            recipe = {**RECOVERY, "steps": given.steps, "validate_every": -(-given.steps // 2)}
            passes.append({"distill": recipe, "id": f"{name}-recovered", "after": [name]})
    return {
        "model": given.model,
        "task": TASK.name,
        "data": {
            "source": str(given.data / given.source),
            "test": str(given.data / given.test) if given.test else None,
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
    way, _, share = branch["name"].removesuffix("-statistics").rpartition("-")
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


def main() -> None:
    """Run the plan and write results/structured-decoder-NAME.json."""
    parser = options(__doc__, "decoder", language_model=True)
    parser.add_argument("--test")
    parser.add_argument("--other", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--steps", type=int, default=40, help="of recovery, of 1,024 tokens each")
    parser.add_argument("--ways", nargs="+", choices=list(ways(0.2, 1)), default=list(ways(0.2, 1)))
    given = parser.parse_args()
    report = compress(plan=plan(given), out=given.out).report
    other = given.data / given.other
    rows = [row_of(branch, other) for branch in report["branches"]]
    torch_target = Target(runtime="torch", sequence=64, generate=64)
    models = [Path(given.model), *(Path(folder_of(branch, "huggingface")) for branch in report["branches"])]
    first, *others = measure(models, torch_target, seconds=60.0)
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
    tokens = given.steps * RECOVERY["batch_size"] * LENGTH
    record(f"structured-decoder-{given.name}", {"recovery_tokens": tokens, "dense": dense, "branches": rows})


if __name__ == "__main__":
    main()
