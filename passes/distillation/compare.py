"""Student beside teacher: runs both on a batch and weighs their losses, computing nothing that no loss reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional

from compress.contract import MASKS
from compress.data.batches import IGNORED
from compress.errors import DataError, TrainingError
from compress.families import layout_of
from compress.masks import Masks, inside
from compress.recipe import TrainingOptions
from compress.record import prefix_of
from compress.state import State
from compress.training import Batch, Beside, train
from passes.distillation.choice import Losses
from passes.distillation.chunked import headless, linear_head, next_token, projected
from passes.distillation.classifier import classifier_of, features, read_by, sample_of
from passes.distillation.heads import Tap, tap
from passes.distillation.losses.base import Reads, Seen
from passes.distillation.losses.states import total
from passes.distillation.monitor import hacked, label_loss
from passes.distillation.pairs import headed, places, widths_of
from passes.distillation.taught import MARK, Taught
from passes.distillation.translation import Translation, numbered
from passes.distillation.unfit import HEAD, refuse_unfit, refuse_untaught

VALIDATION_ROWS = 512
FAR_BELOW = -1e4  # a logit whose probability is zero in float32


class Comparison:
    """The weighted losses of a state's model against its teacher.

    Where no loss reads predictions, only the models below their heads are run; where all that do look at them row by
    row, a language model's logits never exist as a whole. `student` is the part to train, `beside` what losses learn
    along with it; `reference` is the folder or hub name of a further model that losses may ask. With `taught` the
    teacher is not loaded: what it said comes with the batches. With a `translation` the teacher reads other tokens.
    """

    inputs: ClassVar[frozenset[str]] = frozenset({"input_ids", "attention_mask", "token_type_ids"})

    def __init__(
        self,
        losses: Losses,
        state: State,
        reference: str | None = None,
        taught: Taught | None = None,
        translation: Translation | None = None,
    ) -> None:
        self.translation = translation
        self.state, self.chosen, self.reads, self.taught = state, losses.chosen(), Reads(0), taught
        for name, loss in self.chosen.items():
            refuse_unfit(state, name, loss, loaded=taught is None)
            if taught:
                refuse_untaught(state, name, loss, taught.fact)
            self.reads |= loss.reads
        teacher: Any = None if taught else state.teacher
        below = not self.reads & HEAD
        self.student: nn.Module = state.model.base_model if below else state.model
        self.teacher: Any = teacher.base_model if below and teacher else teacher
        self.reference = state.task.load(reference).eval().requires_grad_(False) if reference else None
        self.extras: dict[str, Any] = {"output_hidden_states": bool(self.reads & Reads.STATES)}
        if state.task.name == "text-generation":
            self.extras["use_cache"] = False
        self.taps = {
            name: self.attentions(name, loss, teacher)
            for name, loss in self.chosen.items()
            if loss.reads & Reads.ATTENTION
        }
        self.heads = self.linear_heads()
        self.classifiers: Any = (None, None)
        widths = widths_of(state)
        if self.reads & Reads.FEATURES:
            self.classifiers = mine, theirs = classifier_of(state.model), classifier_of(teacher)
            texts = max(getattr(loss, "sample", 0) for loss in self.chosen.values())
            sample = sample_of(lambda batch: self.look(teacher, batch, 1)[0], teacher, theirs, state.data, texts)
            widths = replace(widths, features=mine.in_features, sample=sample)
        learned = {name: loss.learned(widths) for name, loss in self.chosen.items()}
        self.beside = Beside({name: part for name, part in learned.items() if part is not None})

    def linear_heads(self) -> tuple[nn.Linear | None, nn.Linear | None]:
        """The heads of student and teacher, where logits need not exist as a whole; else none."""
        by_rows = all(loss.by_rows for loss in self.chosen.values())
        if self.state.task.name != "text-generation" or not self.reads & HEAD or not by_rows:
            return None, None
        mine = linear_head(self.state.model)
        theirs = linear_head(self.teacher) if self.teacher is not None else None
        return (mine, theirs) if mine and (theirs or self.taught) else (None, None)

    def attentions(self, name: str, loss: Any, teacher: Any) -> list[tuple[Tap, Tap]]:
        """Where a loss of attention finds those of the student and those of the teacher, in pairs."""
        (model, layout), dense = (self.state.model, self.state.layout), layout_of(teacher)
        if loss.each_block:
            pairs = headed(self.state, teacher, dense)
            found = [(tap(model, layout, mine), tap(teacher, dense, theirs)) for mine, theirs in pairs]
        else:
            found = [(tap(model, layout), tap(teacher, dense, loss.block))]
        for mine, theirs in ((mine.count, theirs.count) for mine, theirs in found):
            if loss.head_by_head and mine != theirs:
                raise TrainingError(
                    f"distill: loss '{name}' compares head by head, {mine} here and {theirs} in the dense model; "
                    "expected as many, or the loss relations"
                )
        return found

    def losses(self, student: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted losses of one batch by name; gradients go to the student and what is beside it only."""
        device = batch["input_ids"].device
        if self.reads & Reads.LABELS and not labels_of(batch):
            raise DataError("distill: loss 'task' reads labels, which the data has not; expected a label column")
        # A model that is wrapped, to hand round its gradients, has to use its head itself.
        my_head, their_head = self.heads if student is self.student else (None, None)
        translated = self.translation(batch) if self.translation else None
        with torch.no_grad():
            theirs, their_heads = self.look_at_teacher(translated.batch if translated else batch, their_head)
            if self.reference is not None:
                known, _ = self.look(self.reference.to(device), batch, side=None)
                theirs = replace(theirs, reference=known)
        mine, my_heads = self.look(student, batch, 0, my_head)
        found = places(self.state, len(mine.states), len(theirs.states)) if mine.states else ()
        mine = replace(mine, share=self.beside.share)
        theirs = replace(theirs, states=[theirs.states[place] for place in found])
        if translated:
            mine, theirs = translated.mine.on(mine), translated.theirs.on(theirs)
        else:
            theirs = replace(theirs, counted=mine.counted, tokens=mine.tokens)
            if any(loss.across for loss in self.chosen.values()):
                mine, theirs = (replace(one, chunks=numbered(one.counted)) for one in (mine, theirs))
        losses = {}
        with torch.autocast(device.type, enabled=False):  # or products of matrices would be bfloat16
            for name, loss in self.chosen.items():
                pairs, own = [(mine, theirs)], dict(self.beside.items()).get(name)
                if name in self.taps:
                    heads = zip(my_heads[name], their_heads[name], strict=True)
                    pairs = [(replace(mine, heads=one), replace(theirs, heads=other)) for one, other in heads]
                losses[name] = loss.weight * total(loss.of(*pair, own) for pair in pairs)
        return losses

    def look_at_teacher(self, batch: Mapping[str, Tensor], head: nn.Linear | None) -> tuple[Seen, dict[str, Any]]:
        """What the teacher shows on a batch, or showed once; nothing where no loss asks it."""
        if not self.reads & ~Reads.LABELS:
            return Seen(batch["attention_mask"].bool()), {}
        if self.taught:
            return self.taught.seen(batch), {}
        return self.look(self.teacher.to(batch["input_ids"].device), batch, 1, head)

    def look(
        self, model: nn.Module, batch: Mapping[str, Tensor], side: int | None, head: nn.Linear | None = None
    ) -> tuple[Seen, dict[str, Any]]:
        """What a model shows on a batch, and the heads of each loss of attention; the student (side 0) sees labels.

        Given its head, the model runs without it.
        """
        given = {name: part for name, part in batch.items() if name in self.inputs}
        labels = labels_of(batch)
        asked = labels if side == 0 and self.reads & Reads.LABELS else {}
        classifier = None if side is None else self.classifiers[side]
        taps = {} if side is None else {name: [pair[side] for pair in pairs] for name, pairs in self.taps.items()}
        with ExitStack() as opened:
            found = {name: [opened.enter_context(one.open()) for one in several] for name, several in taps.items()}
            read = opened.enter_context(read_by(classifier)) if classifier is not None else []
            if head is not None:
                opened.enter_context(headless(head))
            outputs = model(**given, **({} if head is not None else asked), **self.extras)
        mask = batch["attention_mask"].bool()
        states, loss = outputs.hidden_states[1:] if self.reads & Reads.STATES else (), outputs.get("loss")
        seen = Seen(mask, states, loss=loss)
        if self.reads & Reads.PREDICTIONS:
            counted = _rows(outputs, mask, labels, ahead=self.state.task.generates)
            tokens = batch["input_ids"].roll(-1, 1)
            seen = replace(seen, predictions=_predictions(outputs, mask), counted=counted, tokens=tokens)
        if read:
            seen = replace(seen, features=features(read[0], seen.predictions, mask))
        if head is not None:
            predictions = projected(outputs.logits, head)
            seen = replace(seen, predictions=predictions, loss=next_token(predictions, **asked) if asked else None)
        return seen, {
            name: [one.heads(part) for one, part in zip(several, found[name], strict=True)]
            for name, several in taps.items()
        }

    def train(
        self,
        recipe: TrainingOptions,
        folder: Path,
        what: str,
        rows: int = VALIDATION_ROWS,
        turns: Sequence[Callable[[Batch], Batch]] = (),
    ) -> dict[str, Any]:
        """Train the student, validated on so many rows by the same losses, and tell how it went.

        It ends with the weights of the lowest loss, those it came with included. `turns`, one after the other, make of
        each batch of the data the one that is trained on.
        """
        data, size, home = self.state.data, recipe.batch_size, self.state.model.device
        source = self.taught or data
        result = train(
            self.student,
            lambda epoch: source.batches("train", size, seed=recipe.seed + epoch),
            lambda student, batch: self.losses(student, reduce(lambda known, turn: turn(known), turns, batch)),
            recipe,
            folder=folder,
            total_steps=recipe.total_steps(data.count("train")),
            validate=lambda: self.judge(
                lambda: islice(source.batches("validation", size, seed=0), max(1, rows // size))
            ),
            beside=self.beside,
            masks=self.masks(),
            what=what,
        )
        if self.teacher is not None:
            self.teacher.to(home)
        return {
            "losses": {name: loss.model_dump(exclude_defaults=True) for name, loss in self.chosen.items()},
            "loss_before": result.history[0]["validation"],
            "loss_after": result.best_score,
            "warnings": hacked(result.history),
            **result.figures(),
        }

    def masks(self) -> Masks:
        """The masks of the student, where it is sparse."""
        masks = self.state.facts.get(MASKS.name, {})
        return masks if self.student is self.state.model else inside(masks, prefix_of(self.state.model))

    def judge(self, batches: Callable[[], Iterable[Mapping[str, Tensor]]]) -> dict[str, float]:
        """What a validation tells: the losses and, where predictions are read of data with labels, that on labels."""
        told = {"validation": self.mean(batches())}
        if self.reads & HEAD and labels_of(next(iter(batches()))):
            bare = ({name: one for name, one in batch.items() if not name.startswith(MARK)} for batch in batches())
            told["labels"] = label_loss(self.student, bare, **self.extras)
        return told

    @torch.no_grad()
    def gap(self, batches: Iterable[Batch]) -> float:
        """The mean loss over batches as a validation takes it, in the midst of training."""
        mode = self.student.training
        self.student.eval()
        try:
            return self.mean(batches)
        finally:
            self.student.train(mode)

    def mean(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """The sum of the weighted losses, averaged over the rows of some batches."""
        total, rows = 0.0, 0
        for batch in batches:
            placed = send_to_device(batch, next(self.student.parameters()).device)
            total += len(batch["input_ids"]) * float(sum(self.losses(self.student, placed).values()))
            rows += len(batch["input_ids"])
        if not rows:
            raise DataError("distill: the validation split is empty; expected at least one row")
        return total / rows


def labels_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a model is not shown but told by."""
    return {name: one for name, one in batch.items() if name not in Comparison.inputs and not name.startswith(MARK)}


def _predictions(outputs: Any, mask: Tensor) -> Tensor:
    """Logits (..., classes); for question answering (batch, 2, sequence), the classes being the real tokens."""
    if "start_logits" not in outputs:
        return outputs.logits
    return torch.stack([outputs.start_logits, outputs.end_logits], 1).masked_fill(~mask[:, None], FAR_BELOW)


def _rows(outputs: Any, mask: Tensor, labels: Mapping[str, Tensor], ahead: bool) -> Tensor | None:
    """Which tokens' predictions count: those with a label where tokens have labels, all real ones otherwise.

    Predictions of what comes next, `ahead`, count by the label of the next token; the last one's is not known.
    """
    if "start_logits" in outputs or outputs.logits.ndim == 2:
        return None
    counted = labels["labels"] != IGNORED if "labels" in labels else mask
    return functional.pad(counted[:, 1:], (0, 1)) if ahead else counted
