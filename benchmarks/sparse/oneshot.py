"""Zeros in one go by several ways, without recovery: perplexity of a decoder, stories15M or SmolLM2-135M.

    python -m benchmarks.sparse.oneshot --model MODEL --name stories15m --source text/tinystories_sample.txt
        [--test wikitext2/wiki.test.tokens] [--patterns half 2:4] [--ways obert ...] [--out OUT]

`--model` is its folder. Texts lie below `--data`, for which HF_COMPRESS_DATA stands; without `--test` a part of the
source is held out. All ways see the same calibration rows, which none is scored on. Rows that are finished are kept in
a folder, so that a killed run goes on where it was, and ways can be added to a run.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import options, record
from compress.contract import MASKS, Pass
from compress.evaluate import evaluate
from compress.masks import zeros
from compress.plan import Plan, Tables
from compress.runner import Run, remembered
from compress.state import State, Workshop
from exporters import EXPORTERS
from passes import PASSES

TASK = "text-generation"
LENGTH, ROWS = 256, 64
PATTERNS: dict[str, dict[str, Any]] = {
    "half": {"sparsity": 0.5},
    "70": {"sparsity": 0.7},
    "2:4": {"runs": {"keep": 2, "of": 4}},
    "block-4": {"sparsity": 0.5, "block": 4},
}
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: ("sparsify", {"method": method}) for method in METHODS},
    "sparsegpt-allocated": ("sparsify", {"method": "sparsegpt", "rates": "allocated"}),
    "obert": ("obert", {"gradients": ROWS, "batch_size": 1}),
}


def fits(way: str, pattern: str) -> bool:
    """Whether a way can leave the pattern: N:M allots every matrix the same."""
    return "runs" not in PATTERNS[pattern] or "rates" not in WAYS[way][1]


def step_of(way: str, pattern: str) -> Pass:
    """The pass that goes the way."""
    name, options = WAYS[way]
    calibration = {"samples": ROWS, "batch_size": 8} if name == "sparsify" else {}
    return PASSES[name](**PATTERNS[pattern], **options, **calibration)


def perplexity(state: State) -> dict[str, float]:
    """Of the test split, with its interval."""
    found = evaluate(state.model, state.data, state.task, split="test", batch_size=8)["perplexity"]
    return {"perplexity": found.value, "low": found.low, "high": found.high}


def row_of(start: State, way: str, pattern: str, folder: Path) -> dict[str, Any]:
    """Go a way from the dense model and score what is left."""
    state = start.branch()
    state.workshop = Workshop(folder / way / pattern, folder)
    started = time.monotonic()
    (after,) = step_of(way, pattern).run(state)
    seconds = round(time.monotonic() - started, 1)
    share = zeros(after.model, after.facts[MASKS.name])["share"]
    return {"method": way, "pattern": pattern, "share": share, "seconds": seconds, **perplexity(after)}


def main() -> None:
    """Go every way from the dense model and write results/sparse-oneshot-NAME.json."""
    parser = options(__doc__, "sparse-oneshot", language_model=True)
    parser.add_argument("--test")
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=["half", "2:4"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(METHODS))
    given = parser.parse_args()
    data = {
        "source": str(given.data / given.source),
        "test": str(given.data / given.test) if given.test else None,
        "max_length": LENGTH,
        "held_share": 0.3,
        "calibration_rows": ROWS,
        "test_rows": ROWS,
    }
    plan = Plan.read(
        {"model": given.model, "task": TASK, "data": data, "passes": ["sparsify"]}, Tables(PASSES, EXPORTERS)
    )
    rows = []
    with TemporaryDirectory() as folder:
        run = Run(plan, Path(folder))
        start, kept = run.state(None), given.out / run.root_key
        kept.mkdir(parents=True, exist_ok=True)
        dense = remembered(kept / "dense.json", lambda: perplexity(start))
        for pattern in given.patterns:
            for way in given.ways:
                if fits(way, pattern):
                    place = kept / f"{way}-{pattern.replace(':', '-')}.json"
                    rows.append(remembered(place, partial(row_of, start, way, pattern, Path(folder))))
                    print(rows[-1], flush=True)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in start.data.batches("calibration", 8))
    record(f"sparse-oneshot-{given.name}", {"calibration_tokens": tokens, "dense": dense, "rows": rows})


if __name__ == "__main__":
    main()
