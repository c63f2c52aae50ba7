"""State: all that a pass may read and change."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.contract import FACTS, ROWS, VOCABULARY, Fact, Pass, stale_after
from compress.data import Data
from compress.data.rows import write_rows
from compress.data.sources import Row
from compress.errors import TargetError
from compress.families import layout_of
from compress.layout import Layout
from compress.memory import release
from compress.record import prefix_of, record_of
from compress.runtimes import RUNTIMES, example_inputs
from compress.runtimes.examples import longest_sequence
from compress.target import Target
from compress.tasks import Task
from compress.vocabulary import cut_vocabulary

FactValue = Mapping[str, Any]  # tensors are stored as safetensors, everything else as JSON


@dataclass(frozen=True)
class Workshop:
    """Folders a pass may write to: `step` is kept while this step is unfinished, `run` as long as the run's cache."""

    step: Path
    run: Path


@dataclass
class Teacher:
    """The dense model that recovery imitates and speed is compared with.

    `source` is its folder or hub name; None as long as it is the model of a step that is not stored yet. Of a stranger
    to the model compared with it the blocks are no `kin` to that one's, whatever their numbers.
    """

    source: str | None
    task: Task
    kin: bool = True

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in evaluation mode with frozen parameters, loaded when first asked for."""
        if self.source is None:
            raise RuntimeError("a teacher without a source carries its model")
        return self.task.load(self.source).eval().requires_grad_(False)

    def unload(self) -> None:
        """Let the model go where it can be loaded again."""
        if self.source is not None:
            vars(self).pop("model", None)
            release()

    @property
    def config(self) -> PreTrainedConfig:
        """Its config, for which it is not loaded."""
        known = "model" in vars(self) or self.source is None
        return self.model.config if known else AutoConfig.from_pretrained(str(self.source))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies with the model."""
        return AutoTokenizer.from_pretrained(self.source)


@dataclass
class State:
    """A model with everything known about it.

    `facts` holds values by fact name, `figures` what the running pass wants the report to tell (JSON values), and
    `kept` the surviving units of every cut axis, both named and counted as in the dense model. `dense` is what speed
    is compared with, `teacher` what outputs are. A pass that merges finds the states of its further parents in
    `others`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    layout: Layout
    task: Task
    target: Target
    workshop: Workshop
    dense: Teacher
    data: Data
    facts: dict[str, FactValue] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    others: tuple[State, ...] = ()

    @property
    def teacher(self) -> PreTrainedModel:
        """The dense model with the tokens of this one: itself, or a copy cut to them that shares all its other weights.

        For a text of these tokens it gives the dense model's hidden states, and its predictions among them.
        """
        vocabulary = self.facts.get(VOCABULARY.name)
        if vocabulary is None:
            return self.dense.model
        shared: dict[int, Any] = {id(parameter): parameter for parameter in self.dense.model.parameters()}
        copied = copy.deepcopy(self.dense.model, shared)
        cut_vocabulary(copied, vocabulary["kept"].tolist())
        return copied

    def give(self, fact: Fact, value: FactValue) -> None:
        """Set a fact that the running pass provides."""
        self.facts[fact.name] = value

    def replace_rows(self, splits: Mapping[str, Sequence[Row]]) -> None:
        """Put other rows in place of those of some splits, for all that comes after.

        They lie in the run's cache, and the fact `rows` names their files, so that a stored state has them again.
        """
        path = write_rows(splits, self.workshop.run / ROWS.name)
        self.give(ROWS, {"files": [*self.facts.get(ROWS.name, {"files": []})["files"], path.name]})
        self.data = self.data.with_rows(path)

    def forget_stale(self, step: Pass) -> None:
        """Drop the facts that `step` has spoiled."""
        for fact in stale_after(step, frozenset(FACTS[name] for name in self.facts)):
            del self.facts[fact.name]

    def cut(self, axis: str, keep: Sequence[int]) -> None:
        """Cut an axis of the model to the units `keep` and remember which units of the dense model they were."""
        origin = dense_name(axis, self.model)
        units = self.kept.get(origin, list(range(self.layout.axis(axis).units)))
        self.layout = self.layout.cut(self.model, axis, keep)
        self.kept[origin] = [units[unit] for unit in sorted(set(keep))]

    def drop(self, stack: str, keep: Sequence[int]) -> None:
        """Keep only the blocks `keep` of a stack; of the others' axes nothing is left to remember."""
        self.layout = self.layout.drop(self.model, stack, keep)
        present = {dense_name(name, self.model) for name in self.layout.axes}
        self.kept = {name: units for name, units in self.kept.items() if name in present}

    def dense_artifact(self) -> Path:
        """The dense model as the target's runtime takes it: what speed-ups are measured against, built once a run."""
        name = hashlib.sha256(f"{self.dense.source} {self.target.chosen}".encode()).hexdigest()[:12]
        folder = self.workshop.run / "dense" / name
        if not folder.exists():
            self.build(self.dense.model, folder)
        return folder

    def build(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a model to `folder`, whole or not at all, as the target's runtime takes it; a decoder with its cache.

        Raises TargetError where the target asks for more tokens than the model can take.
        """
        length, longest = self.target.sequence + (self.target.generate or 0), longest_sequence(model)
        if self.target.generate and longest and length > longest:
            raise TargetError(f"target: sequence and generate make {length} tokens; this model takes {longest} at most")
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        release()  # an export needs what making the model has left in pieces
        inputs = example_inputs(model, self.tokenizer, batch=2, sequence=min(self.target.sequence, 16))
        RUNTIMES[self.target.chosen].build(model, inputs, unfinished, cache=self.task.generates)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)

    def branch(self) -> State:
        """A state of its own for one of several models that a pass yields; facts and data are shared, not copied.

        So is the memory of all weights: a cut makes new ones and leaves the old model its own, but whoever writes into
        a weight in place gives its module one of its own first.
        """
        release()  # of the branch before there may be cycles left, and all its weights in them
        model = self.model
        shared: dict[int, Any] = {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()}
        shared |= {id(one): one.detach() for one in model.buffers()}
        return State(
            copy.deepcopy(model, shared), self.tokenizer, self.layout, self.task, self.target, self.workshop,
            self.dense, self.data, dict(self.facts), dict(self.figures), dict(self.kept),
        )  # fmt: skip

    def as_dense(self) -> State:
        """The dense model in a state of its own, with its tokenizer and the data as that reads them."""
        tokenizer = self.dense.tokenizer
        return State(
            self.dense.model, tokenizer, layout_of(self.dense.model), self.task, self.target, self.workshop,
            self.dense, self.data.retokenized(tokenizer),
        )  # fmt: skip

    def becomes_dense(self) -> None:
        """Make the present model the dense one: the teacher of what follows and the baseline of its speed."""
        self.dense = Teacher(None, self.task)
        self.dense.model = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.facts.pop(VOCABULARY.name, None)  # it told of the former dense model's tokens
        self.kept = {}  # these were its units


def dense_name(name: str, model: PreTrainedModel) -> str:
    """The name that an axis, or a block, of `model` had before blocks were dropped."""
    prefix = prefix_of(model)
    inner = name.removeprefix(prefix)
    for stack, origins in record_of(model.config)["blocks"].items():
        if inner.startswith(f"{stack}."):
            index, dot, rest = inner.removeprefix(f"{stack}.").partition(".")
            return f"{prefix}{stack}.{origins[int(index)]}{dot}{rest}"
    return name
