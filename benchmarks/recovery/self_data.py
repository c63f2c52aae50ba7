"""An instruction-tuned decoder without a quarter of its blocks, trained on a data set's answers or on its own.

    python -m benchmarks.recovery.self_data --model MODEL --name smollm2 --source gsm8k/train.jsonl
        --test gsm8k/test.jsonl --other wikitext2/wiki.test.tokens [--rows 256] [--epochs 2] [--seeds 0]

`--model` is its folder. Questions with answers lie below `--data`, for which HF_COMPRESS_DATA stands; `--other` is a
text on which nothing is trained, where what is forgotten shows. Both ways see the same questions for as many epochs. A
killed run goes on where it was, and seeds can be added to a run.
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoConfig

from benchmarks.harness import folder_of, options, record
from benchmarks.recovery.decoder import row_of
from benchmarks.structured.decoder import elsewhere
from compress import compress

WAYS = {"fine-tuned on the data's answers": "pruned", "on its own answers (self-data)": "rewritten"}
TEST_ROWS = 100


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """One pruned model, trained on either kind of answers with every seed."""
    blocks = round(0.25 * AutoConfig.from_pretrained(given.model).num_hidden_layers)
    recipe = {"epochs": given.epochs, "batch_size": 8, "learning_rate": 2e-4, "losses": {"task": 1}}
    ways = [
        {"distill": {**recipe, "seed": seed}, "id": f"{start}-{seed}", "after": start}
        for seed in given.seeds
        for start in WAYS.values()
    ]
    return {
        "model": given.model,
        "task": "text-generation",
        "data": {
            "source": str(given.data / given.source),
            "test": str(given.data / given.test),
            "text": "question",
            "label": "answer",
            "max_length": 384,
            "train_rows": given.rows,
            "validation_rows": given.rows // 8,
            "test_rows": TEST_ROWS,
        },
        "passes": [
            {"drop_blocks": {"remove": blocks, "score": "influence", "first_token": False}, "id": "pruned"},
            {"self_data": {"tokens": 200}, "id": "rewritten", "after": "pruned"},
            *ways,
        ],
        "export": ["huggingface"],
    }


def main() -> None:
    """Run the plan and write results/recovery-self-data-NAME.json."""
    parser = options(__doc__, "self-data", language_model=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--rows", type=int, default=256, help="questions to train on")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    report = compress(plan=plan(given), out=given.out).report
    other, answers = given.data / given.other, {}
    found: dict[str, list[dict[str, Any]]] = {start: [] for start in WAYS.values()}
    for branch in report["branches"]:
        own = next((step["figures"] for step in branch["steps"] if step["pass"] == "self_data"), None)
        found["rewritten" if own else "pruned"].append(branch)
        answers = own or answers
    rows = []
    for way, start in WAYS.items():
        forgotten = [elsewhere(folder_of(branch, "huggingface"), other) for branch in found[start]]
        rows.append(row_of(way, found[start], forgotten))
    dense = {"perplexity": report["baseline"]["quality"]["perplexity"]}
    dense["perplexity_elsewhere"] = elsewhere(given.model, other)
    figures = {
        "questions": given.rows,
        "epochs": given.epochs,
        "dense": dense,
        "pruned": {"perplexity": report["branches"][0]["quality_before_recovery"]["perplexity"]},
        "answers": {key: answers[key] for key in ("rewritten", "kept")},
        "rows": rows,
    }
    record(f"recovery-self-data-{given.name}", figures)


if __name__ == "__main__":
    main()
