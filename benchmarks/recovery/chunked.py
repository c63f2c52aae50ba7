"""Losses of a large vocabulary without its logits, beside the plain ones: memory and time of forward and backward pass.

    python -m benchmarks.recovery.chunked [--tokens 2048 --classes 150000 --width 576 --rounds 5 --heads still trained]

Cross-entropy, and KL from a teacher of the same size, of float32 states by a head that is not trained and by one that
is. The two ways take turns in one process, on one thread. Time is that of the processor, in which other programs have
no part. Memory is the most that the process held above what it held before, tensors of states and heads not counted;
the gradient of a trained head, which both ways hold, is. Needs Linux.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import record
from compress.memory import release
from passes.distillation.chunked import cross_entropy
from passes.distillation.losses import LOSSES
from passes.distillation.losses.base import Seen
from passes.distillation.losses.predictions import Projected

Loss = Callable[[], Tensor]


def held(line: str) -> int:
    """Bytes of this process by a line of its status: VmRSS now, VmHWM the most since it was last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(one.split()[1]) for one in status if one.startswith(line))


def measured(loss: Loss, leaves: list[Tensor]) -> tuple[float, int, Tensor]:
    """Seconds and bytes of a loss and its gradients, and the loss."""
    release()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = held("VmRSS"), time.process_time()
    value = loss()
    torch.autograd.grad(value, leaves)
    return time.process_time() - began, held("VmHWM") - before, value.detach()


def ways(given: argparse.Namespace, trained: bool) -> tuple[list[Tensor], dict[str, tuple[Loss, Loss]]]:
    """What gradients are taken in, and of each loss the plain way and the one in slices."""
    generator = torch.Generator().manual_seed(0)
    states, theirs = torch.randn(2, given.tokens, given.width, generator=generator)
    head = torch.randn(given.classes, given.width, generator=generator) / given.width**0.5
    labels = torch.randint(given.classes, (given.tokens,), generator=generator)
    states.requires_grad_()
    teacher_head = head.clone() if trained else head
    head.requires_grad_(trained)
    mask = torch.ones(1, given.tokens, dtype=torch.bool)
    kl = LOSSES["logits"]()

    def plain_kl() -> Tensor:
        with torch.no_grad():
            teacher = theirs @ teacher_head.T
        return kl.of(Seen(mask, predictions=states @ head.T), Seen(mask, predictions=teacher))

    def sliced_kl() -> Tensor:
        both = Projected(states, head), Projected(theirs, teacher_head)
        return kl.of(*(Seen(mask, predictions=one) for one in both))

    return [states, head] if trained else [states], {
        "cross-entropy": (
            lambda: functional.cross_entropy(states @ head.T, labels),
            lambda: cross_entropy(Projected(states, head), labels),
        ),
        "KL": (plain_kl, sliced_kl),
    }


def row_of(name: str, trained: bool, pair: tuple[Loss, Loss], leaves: list[Tensor], rounds: int) -> dict[str, Any]:
    """The figures of one loss; a first round warms up, and the two are compared in it."""
    first = [measured(loss, leaves)[2] for loss in pair]
    torch.testing.assert_close(*first, rtol=1e-5, atol=0)
    found = [[measured(loss, leaves)[:2] for loss in pair] for _ in range(rounds)]
    seconds, most = ([statistics.median(one[side][kind] for one in found) for side in (0, 1)] for kind in (0, 1))
    return {
        "loss": name,
        "head_trained": trained,
        "plain_seconds": seconds[0],
        "sliced_seconds": seconds[1],
        "time_ratio": statistics.median(sliced[0] / plain[0] for plain, sliced in found),
        "plain_bytes": most[0],
        "sliced_bytes": most[1],
        "memory_ratio": most[1] / most[0],
    }


def main() -> None:
    """Measure everything and write results/recovery-chunked.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 2048, "classes": 150_000, "width": 576, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--heads", nargs="+", choices=["still", "trained"], default=["still", "trained"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for head in given.heads:
        trained = head == "trained"
        leaves, losses = ways(given, trained)
        rows += [row_of(name, trained, pair, leaves, given.rounds) for name, pair in losses.items()]
    sizes = {"tokens": given.tokens, "classes": given.classes, "width": given.width}
    record("recovery-chunked", {**sizes, "rows": rows})


if __name__ == "__main__":
    main()
