"""A decoder without a quarter of its blocks, recovered by several losses in equal steps, with several seeds.

    python -m benchmarks.recovery.decoder --model MODEL --name stories15m --source text/tinystories_sample.txt
        --other text/tinyshakespeare.txt [--steps 60] [--seeds 0 1 2]

`--model` is its folder. Texts lie below `--data`, for which HF_COMPRESS_DATA stands; `--other` is a corpus of another
kind, on which nothing is trained. A killed run goes on where it was, and seeds can be added to a run.
"""

from __future__ import annotations

import argparse
from statistics import mean, stdev
from typing import Any

from transformers import AutoConfig

from benchmarks.harness import options, record
from compress import compress

LENGTH, TEST_ROWS = 256, 40
RECIPE = {"batch_size": 4, "learning_rate": 5e-4, "validation_rows": 16}
WAYS: dict[str, dict[str, Any]] = {
    "CE": {"losses": {"task": 1}},
    "KL": {"losses": {"logits": 1}},
    "KL-hidden": {"losses": {"logits": 1, "hidden": 1}},
    "TAID": {"losses": {"taid": 1}},
    "GKD": {"losses": {"jsd": 1}, "on_policy": {"fraction": 0.5, "tokens": 64}},
}


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """One pruned model, recovered every way with every seed."""
    blocks = round(0.25 * AutoConfig.from_pretrained(given.model).num_hidden_layers)
    recipe = {**RECIPE, "steps": given.steps, "validate_every": -(-given.steps // 3)}
    pruning = {"drop_blocks": {"remove": blocks, "score": "influence", "first_token": False, "samples": 32}}
    ways = [
        {"distill": {**recipe, **way, "seed": seed}, "id": f"{name}-{seed}", "after": "pruned"}
        for seed in given.seeds
        for name, way in WAYS.items()
    ]
    return {
        "model": given.model,
        "task": "text-generation",
        "data": {
            "source": str(given.data / given.source),
            "other": str(given.data / given.other),
            "max_length": LENGTH,
            "test_rows": TEST_ROWS,
        },
        "passes": [{**pruning, "id": "pruned"}, *ways],
        "export": [],
    }


def row_of(way: str, branches: list[dict[str, Any]], elsewhere: list[float]) -> dict[str, Any]:
    """The figures of one way over its seeds; `elsewhere` are its perplexities on the other corpus."""
    reached = [branch["quality"]["perplexity"] for branch in branches]
    return {
        "way": way,
        "perplexity": mean(reached),
        "spread": stdev(reached) if len(reached) > 1 else 0.0,
        "perplexity_elsewhere": mean(elsewhere),
        "spread_elsewhere": stdev(elsewhere) if len(elsewhere) > 1 else 0.0,
        "agreement": mean(branch["quality"]["top1_agreement"] for branch in branches),
        "seeds": len(branches),
        "seconds": mean(branch["steps"][-1]["seconds"] for branch in branches),
    }


def main() -> None:
    """Run the plan and write results/recovery-decoder-NAME.json."""
    parser = options(__doc__, "recovery-decoder", language_model=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--steps", type=int, default=60, help="of recovery, of 1,024 tokens each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    report = compress(plan=plan(given), out=given.out).report
    found: dict[str, list[dict[str, Any]]] = {}
    for branch in report["branches"]:
        found.setdefault(branch["name"].rpartition("-")[0], []).append(branch)
    before = report["branches"][0]
    pruned = {"perplexity": before["quality_before_recovery"]["perplexity"]}
    pruned["perplexity_elsewhere"] = before["quality_before_recovery_other"]["perplexity"]
    dense = {"perplexity": report["baseline"]["quality"]["perplexity"]}
    rows = [
        row_of(way, branches, [branch["quality_other"]["perplexity"] for branch in branches])
        for way, branches in found.items()
    ]
    record(f"recovery-decoder-{given.name}", {"steps": given.steps, "dense": dense, "pruned": pruned, "rows": rows})


if __name__ == "__main__":
    main()
