"""The one training loop: accelerate below, one model and one loss function given, resumable to the same bits.

All that a run is, is a function of its step: data order and dropout are seeded by epoch and step, and the learning rate
follows the share of the run that is done. So a checkpoint needs the weights, their average, the optimizer's moments,
the best weights so far and a position, and no random state. A run bounded by `minutes` follows the clock and can't
repeat its bits. Several processes share the batches of an update: their number changes its time and not its result.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, send_to_device
from torch import Tensor, nn

from compress import snapshot
from compress.doctor import bf16_pays
from compress.errors import TrainingError
from compress.masks import Masks, mask_gradients_
from compress.optimizer import optimizer_of
from compress.processes import accelerator, level_
from compress.progress import track
from compress.recipe import TrainingOptions
from compress.recompute import recomputed
from compress.shares import clip_, like, shared
from compress.snapshot import Progress, put_weights, weights_of

Batch = Mapping[str, Tensor]
Batches = Callable[[int], Iterable[Batch]]
Validate = Callable[[], float | Mapping[str, float]]
Loss = Callable[[nn.Module, Batch], Tensor | Mapping[str, Tensor]]

CHECKPOINT = "training.safetensors"
CHECKPOINT_SECONDS = 60.0
VALIDATIONS = 10  # in a run, where the options don't say how often


class Beside(nn.ModuleDict):
    """What a loss learns for its own use: trained, checkpointed and resumed with the model, and no part of it.

    `share` is that of the run that is done.
    """

    share = 1.0


@dataclass(frozen=True)
class TrainingResult:
    """What training did: per validation the step, the mean losses since the one before, and the score."""

    history: list[dict[str, float]]
    best_step: int
    best_score: float | None
    seconds: float
    steps: int

    def figures(self) -> dict[str, Any]:
        """What a report tells of any training."""
        told = {"steps": self.steps, "best_step": self.best_step, "training_seconds": self.seconds}
        return {**told, "history": self.history}


def train(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    options: TrainingOptions,
    *,
    folder: Path,
    total_steps: int | None,
    validate: Validate | None = None,
    beside: Beside | None = None,
    masks: Masks | None = None,
    what: str = "train",
) -> TrainingResult:
    """Train `model` in place and leave it with the weights that validated best, those it came with included.

    `batches` gives the batches of an epoch, the same ones for the same number. `loss` gives a scalar, or named scalars
    whose sum is trained. `validate` gives a score, lower is better, alone or as `validation` among other figures for
    the history; without it the last weights stay. `beside` is trained along. Weights that `masks`, by the names in
    `model`, rule out are zero and stay so. A checkpoint found in `folder` is gone on from. Raises TrainingError where
    there is nothing to train, no data, a loss that is not a number, or the checkpoint of another run.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError(f"{what}: no parameter of the model requires a gradient; expected at least one")
    home, mode = trained[0].device, model.training
    several = options.together and options.shard and accelerator().num_processes > 1
    with torch.random.fork_rng(), recomputed(model) if options.recompute else nullcontext():
        try:
            with shared(model, accelerator().device) if several else nullcontext():
                run = _Run(model, beside or Beside(), options, folder / CHECKPOINT, total_steps, what, masks or {})
                progress = run.go(batches, loss, validate)
        finally:
            model.__dict__.pop("_is_accelerate_prepared", None)  # accelerate would not take the model a second time
            model.to(home).train(mode)
    seconds = round(progress.seconds, 2)
    return TrainingResult(progress.history, progress.best_step, progress.best_score, seconds, progress.step)


class _Run:
    """One run: the accelerator, the optimizer, the progress, the average and the best weights."""

    def __init__(
        self,
        model: nn.Module,
        beside: Beside,
        options: TrainingOptions,
        path: Path,
        total: int | None,
        what: str,
        masks: Masks,
    ) -> None:
        self.accelerator = accelerator()
        self.processes = self.accelerator.num_processes if options.together else 1
        if options.accumulate % self.processes:
            raise TrainingError(
                f"{what}: {self.processes} processes can't share alike the {options.accumulate} batches of an update; "
                f"expected accumulate to be a multiple of {self.processes}, with the smaller batches that this allows"
            )
        self.beside, self.options, self.path, self.total, self.what = beside, options, path, total, what
        self.held = nn.ModuleDict({"model": model, "beside": beside})  # all that is trained
        self.device = self.accelerator.device
        self.shared = options.shard and self.processes > 1
        whole = self.shared or not options.together
        self.model = model.to(self.device) if whole else self.accelerator.prepare_model(model)
        self.beside.to(self.device)
        self.optimizer = optimizer_of(self.held, options)
        held = {name: model.get_parameter(name) for name in masks}
        self.masked = [(held[name], like(mask.to(self.device), held[name])) for name, mask in masks.items()]
        self.bfloat16 = options.precision == "bfloat16" or (options.precision == "auto" and bf16_pays())
        self.progress = Progress()
        self.best: snapshot.Weights = {}
        self.average: snapshot.Weights = weights_of(self.held, buffers=False) if options.average else {}
        self.settled = True  # False while weights and progress may disagree
        shapes = [(name, tuple(parameter.shape)) for name, parameter in self.held.named_parameters()]
        recipe = options.model_dump(exclude={"shard"})  # whole or in shares, it is one run
        self.identity = hashlib.sha256(repr((recipe, total, shapes)).encode()).hexdigest()
        if path.exists():
            self.progress, self.best, self.average = snapshot.read(path, self.identity, self.held, self.optimizer)
        self.started = time.monotonic() - self.progress.seconds

    def go(self, batches: Batches, loss: Loss, validate: Validate | None) -> Progress:
        """Train from where the run stands to its end."""
        self.model.train(self.options.dropout)
        if validate and not self.progress.history:
            self.judge(validate)
        stream, saved = self.stream(batches), time.monotonic()
        left = None if self.total is None else self.total - self.progress.step
        try:
            for before in track(self.turns(), self.what, left):
                self.step(stream, loss)
                if validate and self.due(before, self.share(self.progress.step)):
                    self.judge(validate)
                every, waited = self.options.checkpoint_every, self.agree(time.monotonic() - saved)
                if self.progress.step % every == 0 if every else waited > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if self.settled and not self.shared:  # shares can be gathered where all processes stand at one step
                self.save()
            raise
        if validate and self.progress.history[-1]["step"] != self.progress.step:
            self.judge(validate)  # the clock ended the run between two validations
        put_weights(self.held, self.best if validate else self.average)
        if not validate:
            self.progress.best_step = self.progress.step
        self.progress.seconds = time.monotonic() - self.started
        return self.progress

    def turns(self) -> Iterator[float]:
        """Yield the share of the run that is done, until it is done or has stopped gaining."""
        patience = self.options.patience or math.inf
        while (share := self.share(self.progress.step)) < 1 and self.progress.gainless < patience:
            yield share

    def share(self, step: float) -> float:
        """The share of the run that is done with so many steps, by count or by the clock, whichever is further."""
        by_count = step / self.total if self.total else 0.0
        if self.options.minutes is None:
            return by_count
        return max(by_count, self.agree(time.monotonic() - self.started) / (60 * self.options.minutes))

    def agree(self, value: float) -> float:
        """The main process's value, so that all processes decide alike."""
        return value if self.processes == 1 else float(broadcast(torch.tensor(value, device=self.device)))

    def due(self, before: float, after: float) -> bool:
        """Whether a validation falls between two shares of the run."""
        if self.options.validate_every:
            return self.progress.step % self.options.validate_every == 0 or after >= 1
        return int(before * VALIDATIONS) < int(after * VALIDATIONS)

    def stream(self, batches: Batches) -> Iterator[tuple[int, int, Batch]]:
        """Yield (epoch, batches taken from it, batch) from the present position on, epoch after epoch."""
        epoch, offset = self.progress.epoch, self.progress.offset
        while True:
            taken = offset
            for taken, batch in enumerate(islice(batches(epoch), offset, None), offset + 1):
                yield epoch, taken, batch
            if taken == 0:
                raise TrainingError(f"{self.what}: the training data has no batch; expected at least one an epoch")
            epoch, offset = epoch + 1, 0

    def step(self, stream: Iterator[tuple[int, int, Batch]], loss: Loss) -> None:
        """Take one step: `accumulate` batches, dealt out to the processes, one update."""
        progress, options = self.progress, self.options
        mine = range(self.accelerator.process_index % self.processes, options.accumulate, self.processes)
        sums: dict[str, float] = {}
        self.beside.share = self.share(progress.step + 0.5)
        rate = options.rate(self.beside.share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for turn in range(options.accumulate):
            epoch, offset, batch = next(stream)
            if turn not in mine:
                continue
            torch.manual_seed(_seed(options.seed, progress.step, turn))
            with nullcontext() if turn == mine[-1] else self.accelerator.no_sync(self.model):
                with self.autocast():
                    given = loss(self.model, send_to_device(batch, self.device))
                parts = dict(given) if isinstance(given, Mapping) else {"loss": given}
                total = torch.stack(list(parts.values())).sum()
                values = {name: float(part.detach()) for name, part in {**parts, "loss": total}.items()}
                self.check(values, rate)
                self.accelerator.backward(total / len(mine))
            sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        if self.processes > 1:
            sums = level_(self.beside, sums, self.accelerator)
        mask_gradients_(self.masked)
        if options.clip:
            norm = self.clip(options.clip)
            self.check({"norm of the gradient": norm}, rate)
        self.settled = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step, progress.epoch, progress.offset = progress.step + 1, epoch, offset
        progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in sums.items()}
        progress.since, progress.last_loss = progress.since + options.accumulate, values["loss"]
        self.follow()
        self.settled = True

    def clip(self, most: float) -> float:
        """Scale the gradients down to a norm; return the one they had."""
        if self.shared:
            return clip_(self.held["model"], self.beside, most)
        return float(self.accelerator.clip_grad_norm_(self.held.parameters(), most))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average, where there is one, towards the weights; it forgets the first ones sooner."""
        step, current = self.progress.step, dict(self.held.named_parameters())
        for name, mean in self.average.items():
            mean.lerp_(current[name], 1 - min(self.options.average or 0, (1 + step) / (10 + step)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their average, where there is one."""
        own = weights_of(self.held, buffers=False) if self.average else {}
        put_weights(self.held, self.average)
        try:
            yield
        finally:
            put_weights(self.held, own)

    def autocast(self) -> torch.autocast:
        """Mixed precision, over every model that the loss runs; bfloat16 needs no scaling of the loss."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def check(self, values: Mapping[str, float], rate: float) -> None:
        """Raise TrainingError where a value is not a finite number."""
        for name, value in values.items():
            if not math.isfinite(value):
                good = self.progress.last_loss
                raise TrainingError(
                    f"{self.what}: the {name} is {value} at step {self.progress.step + 1} (learning rate {rate:.2e}, "
                    f"last good loss {'none' if good is None else f'{good:.4g}'}); expected a finite number: "
                    "lower learning_rate, lengthen warmup, or set precision: float32"
                )

    def judge(self, validate: Validate) -> None:
        """Validate, write the entry of the history and hold on to the best weights."""
        progress = self.progress
        self.model.eval()
        with self.averaged():
            with torch.no_grad(), self.autocast():
                given = validate()
            told = dict(given) if isinstance(given, Mapping) else {"validation": given}
            score = told["validation"] = self.agree(told["validation"])
            self.check({"validation score": score}, self.options.rate(self.share(progress.step)))
            if gained := progress.best_score is None or score < progress.best_score:
                progress.best_step, progress.best_score, self.best = progress.step, score, weights_of(self.held)
        self.model.train(self.options.dropout)
        means = {name: value / progress.since for name, value in progress.sums.items()}
        progress.history.append({"step": progress.step, **means, **told})
        progress.sums, progress.since, progress.gainless = {}, 0, 0 if gained else progress.gainless + 1

    def save(self) -> None:
        """Write the checkpoint."""
        self.progress.seconds = time.monotonic() - self.started
        parts = {"weights": weights_of(self.held), "best": self.best, "average": self.average}
        snapshot.write(self.path, self.identity, self.progress, parts, self.optimizer)


def _seed(*parts: int) -> int:
    """A seed for one batch, unlike that of every other."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])
