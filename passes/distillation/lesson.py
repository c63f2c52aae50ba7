"""A lesson: the dense model at work on the rows of a shard, and what is kept of its outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compress.data.batches import cut
from compress.errors import TrainingError
from compress.families import layout_of
from compress.processes import accelerator
from compress.state import State
from compress.statistics import frozen
from passes.distillation.chunked import headless, held_on, linear_head, projected, slices
from passes.distillation.losses.predictions import picked
from passes.distillation.taught import ENTRIES, PREDICTIONS, SCORES, SPLITS, draw, entries, lengths_of

if TYPE_CHECKING:
    from passes.distillation.teach import Teach


class Lesson:
    """A state's teacher, on the device that trains, and what `asked` wants to keep of it.

    Raises TrainingError where it has not the blocks.
    """

    def __init__(self, asked: Teach, state: State) -> None:
        self.asked, self.data, teacher = asked, state.data, state.teacher
        self.model: Any = teacher if asked.samples else teacher.base_model
        self.blocks = list(layout_of(teacher).stacks.values())[-1].length
        for block in asked.states:
            if block not in range(-self.blocks, self.blocks):
                raise TrainingError(
                    f"teach: the dense model has no block {block}; expected one of -{self.blocks}..{self.blocks - 1}"
                )
        self.states = sorted({block % self.blocks for block in asked.states})
        generates = state.task.name == "text-generation"
        config: Any = teacher.config
        self.classes: int = config.vocab_size if generates else config.num_labels
        by_token = state.task.name != "text-classification"
        self.drawn = by_token and self.classes > asked.samples > 0  # else predictions are few, and kept whole
        self.head = linear_head(teacher) if self.drawn and generates else None
        self.extras: dict[str, Any] = {"use_cache": False} if generates else {}
        self.extras["output_hidden_states"] = bool(self.states)

    @property
    def identity(self) -> str:
        """A hash of the model's weights."""
        whole = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            whole.update(name.encode())
            whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return whole.hexdigest()

    def told(self) -> dict[str, Any]:
        """What has to be known to read what was kept; JSON values."""
        return {
            "blocks": self.blocks,
            "states": self.states,
            "drawn": self.drawn,
            "temperature": self.asked.temperature if self.drawn else 1.0,
        }

    def shard(self, split: str, rows: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of a shard, as `taught` describes them."""
        lengths = lengths_of(self.data, split)
        home = self.model.device
        kept: dict[int, dict[str, Tensor]] = {}
        self.model.to(accelerator().device)
        try:
            for numbers in cut(sorted(rows, key=lambda row: -lengths[row]), self.asked.batch_size):
                found = self.look(split, numbers)
                sizes = [lengths[number] for number in numbers]
                many = [int(part.sum()) for part in found["counts"].split(sizes)] if "counts" in found else []
                parts = {
                    name: one.split(1 if name == SCORES else many if name in ENTRIES else sizes)
                    for name, one in found.items()
                }
                kept |= {number: {name: parts[name][at] for name in parts} for at, number in enumerate(numbers)}
        finally:
            self.model.to(home)
        stored = {name: torch.cat([kept[row][name] for row in rows]) for name in kept[rows[0]]}
        return {**stored, "lengths": torch.tensor([lengths[row] for row in rows], dtype=torch.int32)}

    def look(self, split: str, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What is kept of some rows, their tokens one after another."""
        device = self.model.device
        batch = {name: one.to(device) for name, one in self.data.batch(split, numbers).items()}
        given = {name: batch[name] for name in batch.keys() & {"input_ids", "attention_mask", "token_type_ids"}}
        mask = batch["attention_mask"].bool()
        found: dict[str, Tensor] = {}
        with frozen(self.model), ExitStack() as opened:
            if self.head is not None:
                opened.enter_context(headless(self.head))
            outputs = self.model(**given, **self.extras)
            for block in self.states:
                found[f"states.{block}"] = self.narrow(picked(outputs.hidden_states[1:][block], mask), block)
            if self.drawn:
                rows = picked(outputs.logits, mask)
                found |= self.draws(rows if self.head is None else projected(rows, self.head), split, numbers)
            elif self.asked.samples:
                whole = outputs.logits.ndim == 2
                found[SCORES if whole else PREDICTIONS] = outputs.logits if whole else picked(outputs.logits, mask)
        return {name: one.cpu() for name, one in found.items()}

    def narrow(self, states: Tensor, block: int) -> Tensor:
        """States in the precision that was asked for; TrainingError where they are too large for it."""
        narrow = states.to(getattr(torch, self.asked.precision))
        if not narrow.isfinite().all():
            most, precision = float(states.abs().max()), self.asked.precision
            raise TrainingError(
                f"teach: states after block {block} reach {most:.3g}, which {precision} can't hold; "
                "expected precision: bfloat16"
            )
        return narrow

    def draws(self, rows: Any, split: str, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Tokens drawn from predictions (rows, classes), a few rows at a time; in any batch a row has the same."""
        asked, lengths = self.asked, lengths_of(self.data, split)
        own = [np.random.default_rng((asked.seed, SPLITS.index(split), number)) for number in numbers]
        places = np.concatenate([random.random(lengths[number]) for random, number in zip(own, numbers, strict=True)])
        starts = torch.from_numpy(places).to(self.model.device)
        parts = []
        held = held_on(starts.device)
        for block in slices(len(rows), held.block // self.classes):
            logits, begin = rows[block], starts[block]
            for part in slices(len(logits), held.part // self.classes):
                found = draw(logits[part], begin[part], asked.samples, asked.temperature, asked.proposal)
                parts.append(entries(found, self.classes))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
