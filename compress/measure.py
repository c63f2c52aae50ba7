"""Measure artifacts against one another in one fresh process, and turn the times into a ratio with an interval.

Times on a shared machine lie, and this is what is done about it. All artifacts are open in one process that does
nothing else, pinned to the least busy cores, with as many threads as the target says. They run in rounds, each once a
round in shuffled order, so that a slow moment slows all of them; a ratio is computed within the rounds, and rounds go
on until the ratios are known to a percent or the time is up. A timed run follows an untimed one of the same artifact:
in service a model finds its weights in the cache where they fit, and here the others have just thrown them out. Medians
that snap to the scheduler's ticks are told, and so is how long the process stood in line for its cores.

Where the target generates, a run is a whole request, prompt and every token, nothing extrapolated. All but its first
token find the weights at hand, so it follows no untimed run.

The process, `python -m compress.measure REQUEST ANSWER`, imports only what the artifacts' runtime needs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from compress.errors import CompressError, TargetError
from compress.memory import release
from compress.runtimes import open_artifact, runtime_of
from compress.target import Target, available_cores

WARM_UP = 3
FEWEST_ROUNDS = 10
TIGHT = 0.01  # half-width of a ratio's interval, as a share of the ratio, at which measuring ends
CONFIDENCE = 0.95
CROWDED = 0.1  # share of the time spent in line for a core, above which times are doubted
TICK_MS = 4.0  # the scheduler's tick on common Linux kernels


@dataclass(frozen=True)
class Timing:
    """Times of one artifact: the median with its interval, and the time of every round (milliseconds).

    `waited` is the share of the measurement for which a thread stood in line while others had its core, where known.
    """

    milliseconds: float
    low: float
    high: float
    samples: tuple[float, ...]
    quantised: bool
    waited: float | None = None

    @property
    def crowded(self) -> bool:
        """Whether others took the cores so often that times may be too long, and ratios of them wrong."""
        return self.waited is not None and self.waited > CROWDED

    @classmethod
    def of(cls, samples: Sequence[float], waited: float | None = None, seed: int = 0) -> Timing:
        """Summarise the times of all rounds; the interval is a bootstrap of the median."""
        times = np.asarray(samples, dtype=np.float64)
        low, high = _interval(np.median(_drawn(times[None], seed, 1000)[0], axis=1))
        return cls(float(np.median(times)), low, high, tuple(times.tolist()), quantised(times), waited)


class Ratio(NamedTuple):
    """How many times faster, with a 95 % confidence interval."""

    value: float
    low: float
    high: float


def speedup(dense: Timing, candidate: Timing, seed: int = 0, draws: int = 2000) -> Ratio:
    """Median time of `dense` over that of `candidate`; the interval is a bootstrap over rounds, paired.

    Both must come from one call of `measure`: round i of one ran beside round i of the other.
    """
    if len(dense.samples) != len(candidate.samples):
        raise TargetError(
            f"times of {len(dense.samples)} and {len(candidate.samples)} rounds; expected one measurement"
        )
    both = _drawn(np.asarray([dense.samples, candidate.samples]), seed, draws)
    medians = np.median(both, axis=2)
    low, high = _interval(medians[0] / medians[1])
    return Ratio(dense.milliseconds / candidate.milliseconds, low, high)


def apart(dense: Timing, candidate: Timing, seed: int = 0, draws: int = 2000) -> Ratio:
    """The same for times of two calls of `measure`, such as those of two runtimes, whose rounds are no pairs."""
    one, two = (
        np.median(_drawn(np.asarray([timing.samples]), seed + place, draws)[0], axis=1)
        for place, timing in enumerate((dense, candidate))
    )
    return Ratio(dense.milliseconds / candidate.milliseconds, *_interval(one / two))


def quantised(times: np.ndarray) -> bool:
    """Whether most times are whole scheduler ticks: then they tell of the scheduler, not of the model."""
    ticks = times / TICK_MS
    whole = (np.abs(ticks - np.round(ticks)) * TICK_MS < 0.05) & (np.round(ticks) >= 1)
    return bool(whole.mean() > 0.6)


def measure(
    artifacts: Sequence[Path], target: Target, *, seconds: float = 20.0, rounds: int = 2000, seed: int = 0
) -> list[Timing]:
    """Time artifacts of one runtime on what the target asks; the first is what the others are compared with.

    `seconds` bounds the measuring (not the opening), `rounds` the runs of each. Raises TargetError where an artifact
    can't be opened or run, or where two runtimes meet: their thread pools would slow each other.
    """
    runtimes = {runtime_of(path).name for path in artifacts}
    if len(runtimes) > 1:
        raise TargetError(f"artifacts of {' and '.join(sorted(runtimes))}; expected one runtime in a measurement")
    request = {
        "artifacts": [str(Path(path).resolve()) for path in artifacts],
        "target": target.model_dump(),
        "seconds": seconds,
        "rounds": rounds,
        "seed": seed,
    }
    release()  # what is timed lies in another process' memory, beside that of this one
    root = str(Path(__file__).resolve().parent.parent)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(target.threads))
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request))
        child = subprocess.run(
            [sys.executable, "-m", "compress.measure", str(asked), str(answered)],
            env={**os.environ, **threads, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        if not answered.exists():
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise TargetError(f"measuring stopped with exit code {child.returncode}: {last}")
        answer = json.loads(answered.read_text())
    if "error" in answer:
        raise TargetError(answer["error"])
    return [Timing.of(samples, answer["waited"]) for samples in answer["samples"]]


def interleave(
    calls: Sequence[Callable[[], Any]], *, seconds: float, rounds: int = 2000, seed: int = 0, warm: bool = True
) -> list[list[float]]:
    """Milliseconds of each call, once a round in shuffled order; if `warm`, each time right after an untimed call."""
    for call in calls:
        for _ in range(WARM_UP if warm else 1):
            call()
    samples: list[list[float]] = [[] for _ in calls]
    order, shuffle = list(range(len(calls))), random.Random(seed)
    end, check = time.monotonic() + seconds, 2 * FEWEST_ROUNDS
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        if done == check:
            if _widest(np.asarray(samples)) < TIGHT:
                break
            check *= 2
        shuffle.shuffle(order)
        for index in order:
            if warm:
                calls[index]()
            start = time.perf_counter()
            calls[index]()
            samples[index].append((time.perf_counter() - start) * 1e3)
    return samples


def pin(threads: int) -> None:
    """Keep this process on the least busy cores, one for each thread, where the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        busy = psutil.cpu_percent(interval=0.2, percpu=True)
        cores = sorted(available_cores(), key=lambda core: busy[core] if core < len(busy) else 0.0)
        os.sched_setaffinity(0, cores[:threads])


def in_line() -> float | None:
    """Seconds that threads of this process stood in line for a core so far; None where the system doesn't tell."""
    try:
        told = [Path(task, "schedstat").read_text().split() for task in Path("/proc/self/task").iterdir()]
    except OSError:
        return None
    return sum(int(waited) for _, waited, _ in told) / 1e9


def _widest(times: np.ndarray) -> float:
    """Largest relative half-width among the intervals of all ratios to the first row of `times` (calls, rounds)."""
    medians = np.median(_drawn(times, 0, 200), axis=2)
    ratios = medians[0] / medians
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    return float(((high - low) / 2 / np.median(ratios, axis=1)).max()) if len(times) > 1 else _spread(medians[0])


def _spread(medians: np.ndarray) -> float:
    """Relative half-width of the interval of one median, where there is nothing to compare with."""
    low, high = _interval(medians)
    return (high - low) / 2 / float(np.median(medians))


def _drawn(times: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """Bootstrap samples of rounds, the same rounds for every row: (rows, rounds) -> (rows, draws, rounds)."""
    rounds = times.shape[1]
    return times[:, np.random.default_rng(seed).integers(rounds, size=(draws, rounds))]


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the measuring process writes: the samples, or the user's mistake in words."""
    target = Target(**request["target"])
    pin(target.threads)
    try:
        sessions = [open_artifact(Path(path), target) for path in request["artifacts"]]
    except CompressError as error:
        return {"error": str(error)}
    calls: list[Callable[[], Any]] = []
    bounds = {name: request[name] for name in ("seconds", "rounds", "seed")}
    try:
        for session in sessions:
            inputs = session.example(target.batch, target.sequence)
            if target.generate is None:
                calls.append(session.ready(inputs))
            else:
                calls.append(partial(session.generate, inputs["input_ids"], target.generate))
        start, before = time.monotonic(), in_line()
        samples = interleave(calls, **bounds, warm=target.generate is None)
        took, after = time.monotonic() - start, in_line()
        waited = None if before is None or after is None else (after - before) / took / target.threads
        return {"samples": samples, "waited": waited}
    except CompressError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    asked, answered = sys.argv[1:]
    Path(answered).write_text(json.dumps(_answer(json.loads(Path(asked).read_text()))))
