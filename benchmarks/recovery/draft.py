"""A decoder without some of its blocks as the draft of its whole self, recovered by several losses in equal steps.

    python -m benchmarks.recovery.draft --name stories15m --model FOLDER --source text/tinystories_sample.txt

`--source` lies under `--data` (HF_COMPRESS_DATA). A draft is judged on how texts of the test split go on: the share of
its tokens that the whole model takes, and tokens a second beside writing alone, in torch on one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import options, record
from compress import compress, load
from compress.data import Data, DataOptions
from compress.evaluate.draft import draft_with
from compress.tasks import TASKS

LENGTH = 128
PROMPT, PROMPTS, TOKENS, AHEAD = 16, 4, 48, 4  # tokens of a prompt, and their number; tokens written; guesses a run
WAYS: dict[str, dict[str, Any]] = {
    "forward": {"losses": {"logits": 1}},
    "reverse": {"losses": {"reverse": 1}},
    "on-policy": {"losses": {"jsd": 1}, "on_policy": {"fraction": 0.5, "tokens": 48}},  # DistillSpec
    "selected": {"losses": {"logits": {"keep": 0.4}}},  # AdaSPEC, the teacher for its reference
}


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """One pruned model, left as it is and recovered by every way; it is pruned once."""
    pruning = {"drop_blocks": {"remove": given.blocks, "samples": 32}}
    recipe = {"steps": given.steps, "batch_size": 8, "learning_rate": 5e-4, "precision": "float32"}
    ways = [
        {"distill": {**recipe, **way, "validation_rows": 32}, "id": name, "after": "pruning"}
        for name, way in WAYS.items()
    ]
    return {
        "model": given.model,
        "task": "text-generation",
        "data": {"source": str(given.data / given.source), "max_length": LENGTH},
        "target": {"runtime": "torch", "sequence": PROMPT, "generate": TOKENS},
        "passes": [{**pruning, "id": "pruning"}, {**pruning, "id": "pruned", "after": []}, *ways],
        "export": ["huggingface"],
    }


def beginnings(model: str, source: Path) -> list[list[int]]:
    """The first tokens of some texts that nothing was trained on."""
    _, tokenizer = load(model)
    data = Data.open(DataOptions(source=str(source), max_length=LENGTH), tokenizer, TASKS["text-generation"])
    return [row["input_ids"][:PROMPT].tolist() for row in data.split("test").encoded.sequences[:PROMPTS]]


def main() -> None:
    """Run the plan and write results/recovery-draft-NAME.json."""
    parser = options(__doc__, "draft", language_model=True)
    parser.add_argument("--blocks", type=int, default=3, help="how many blocks go")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    result = compress(plan=plan(given), out=given.out)
    torch.set_num_threads(1)
    model, _ = load(given.model)
    prompts = beginnings(given.model, given.data / given.source)
    rows = []
    for branch in result.report["branches"]:
        draft, _ = load(branch["artifacts"][0]["path"])
        found = draft_with(model, draft, prompts, tokens=TOKENS, ahead=AHEAD, seconds=30.0)
        rows.append(
            {
                "way": branch["name"].split("/")[-1],
                "parameters": branch["parameters"],
                "perplexity": branch["quality"]["perplexity"],
                "agreement": branch["quality"]["top1_agreement"],
                "acceptance": found.acceptance,
                "per_run": found.per_run,
                "tokens_per_second": 1e3 * found.tokens / found.assisted.milliseconds,
                "alone_tokens_per_second": 1e3 * found.tokens / found.plain.milliseconds,
                "speedup": found.speedup._asdict(),
            }
        )
    dense = {name: result.report["baseline"][name] for name in ("parameters", "quality")}
    record(f"recovery-draft-{given.name}", {"ahead": AHEAD, "steps": given.steps, "dense": dense, "drafts": rows})


if __name__ == "__main__":
    main()
