"""A language model that lost blocks, recovered by labels, by its teacher at work, and by what the teacher said once.

    python -m benchmarks.recovery.cached --model MODEL --name stories15m --source text/tinystories_sample.txt
        [--test FILE] [--samples 16 64] [--steps 80] [--remove 1]

`--model` is its folder. Texts lie below `--data`, for which HF_COMPRESS_DATA stands. All ways start from one model and
see the same batches. A step is timed by forward and backward pass and the reading of its batch, the ways in turn, on
one thread, by the time of the processor. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import options, record
from compress import store
from compress.evaluate import evaluate
from compress.plan import Node, Plan, Tables
from compress.runner import Run, prepare, remembered
from passes import PASSES
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.distillation.distill import still_tables
from passes.distillation.taught import Taught

LENGTH, BATCH = 256, 4
ONLINE, LABELS = "online KL", "labels"


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """All ways beside one another, after one pruning."""
    recipe = {"steps": given.steps, "batch_size": BATCH, "learning_rate": 2e-4, "validation_rows": 16}
    passes: list[dict[str, Any]] = [
        {"drop_blocks": {"remove": given.remove, "score": "influence", "first_token": False}, "id": "pruned"},
        {"distill": {**recipe, "losses": {"task": 1}}, "id": "labels", "after": ["pruned"]},
        {"distill": {**recipe, "losses": {"logits": 1}}, "id": "online", "after": ["pruned"]},
    ]
    for samples in given.samples:
        passes.append({"teach": {"samples": samples}, "id": f"teach-{samples}", "after": ["pruned"]})
        cached = {"distill": {**recipe, "losses": {"logits": 1}, "cached": True}}
        passes.append({**cached, "id": f"cached-{samples}", "after": [f"teach-{samples}"]})
    return {
        "model": given.model,
        "task": "text-generation",
        "data": {
            "source": str(given.data / given.source),
            "test": str(given.data / given.test) if given.test else None,
            "max_length": LENGTH,
            "test_rows": 40,
        },
        "passes": passes,
        "export": [],
    }


def scores(run: Run, node: Node | None) -> dict[str, float]:
    """Perplexity on both held-out splits, and KL to the dense model; None stands for that itself."""
    state = run.state(node)

    def judge() -> dict[str, float]:
        found = {}
        for split in ("validation", "test"):
            given = evaluate(state.model, state.data, state.task, split=split, teacher=state.teacher, batch_size=8)
            found |= {f"{split}_perplexity": given["perplexity"].value, f"{split}_kl": given["kl"].value}
        return found

    return remembered(run.cache / "scores" / f"{run.key(node) if node else 'dense'}.json", judge)


def steps(run: Run, node: Node, losses: dict[str, float], cached: bool) -> Iterator[None]:
    """Take a step of recovery, without the update, each time that one is asked for."""
    state = run.state(node)
    taught = Taught([state.facts["predictions"]], run.cache, state.data) if cached else None
    compare = Comparison(Losses(**losses), state, taught=taught)
    with still_tables(compare.student):
        while True:
            for batch in (taught or state.data).batches("train", BATCH, seed=0):
                sum(compare.losses(compare.student, batch).values()).backward()
                compare.student.zero_grad()
                yield


def timed(ways: dict[str, Iterator[None]], rounds: int) -> dict[str, float]:
    """Seconds of a step of each way, the median of so many rounds."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):  # the first two warm up
        for name, way in ways.items():
            began = time.process_time()
            next(way)
            if number > 1:
                found[name].append(time.process_time() - began)
    return {name: statistics.median(taken) for name, taken in found.items()}


def main() -> None:
    """Run the plan, time the ways and write results/recovery-cached-NAME.json."""
    parser = options(__doc__, "cached", language_model=True)
    parser.add_argument("--test")
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--remove", type=int, default=1, help="blocks that go")
    parser.add_argument("--rounds", type=int, default=20, help="of timing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(Plan.read(plan(given), Tables(PASSES, {})), prepare(given.out, fresh=False))
    run.go()
    nodes = {node.step.id: node for node in run.plan.nodes()}
    ways = {LABELS: ("labels", "pruned", {"task": 1.0}), ONLINE: ("online", "pruned", {"logits": 1.0})}
    ways |= {f"{count} draws": (f"cached-{count}", f"teach-{count}", {"logits": 1.0}) for count in given.samples}
    going = {name: steps(run, nodes[before], losses, before != "pruned") for name, (_, before, losses) in ways.items()}
    seconds = timed(going, given.rounds)
    rows = []
    for name, (after, before, _) in ways.items():
        row: dict[str, Any] = {"way": name, **scores(run, nodes[after]), "step_seconds": seconds[name]}
        if before != "pruned":
            told = store.row_of(run.folder(nodes[before]))["figures"]
            whole = 2 * told["tokens"] * run.state(None).model.config.vocab_size
            row |= {"bytes": told["bytes"], "bytes_of_logits": whole, "bytes_a_token": told["bytes"] / told["tokens"]}
        rows.append(row)
    figures = {"dense": scores(run, None), "pruned": scores(run, nodes["pruned"]), "ways": rows}
    record(f"recovery-cached-{given.name}", {"tokens": given.steps * BATCH * LENGTH, **figures})


if __name__ == "__main__":
    main()
