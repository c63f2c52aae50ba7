"""Runs a plan: walks its graph, stores every node under the hash of all that made it, and resumes from what is there.

A node's key is the hash of its pass (name, version, options), the task, the target, the data's fingerprint and its
parents' keys, down to the fingerprint of the model itself. So a second run of an edited plan redoes what changed and
what hangs on it, and a killed run goes on where it was: finished nodes are found by their keys, and an unfinished pass
finds its own checkpoints in its workshop.

Where one of several models can't be what was asked, all that would be made of it is left out, and the others go on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from compress import store
from compress.contract import FACTS, MASKS, TEACHER
from compress.data import Data
from compress.errors import CompressError, DataError, ReachError
from compress.families import layout_of
from compress.masks import zeros
from compress.memory import release
from compress.plan import Node, Plan, leaves
from compress.plan.world import MARKER, unusable
from compress.processes import gather, leads
from compress.progress import say
from compress.state import State, Teacher, Workshop
from compress.tasks import TASKS, Task, infer_task
from compress.verdict import KeepIf
from compress.worth import worth

CACHE = ".cache"  # the folder, in that of the results, of all that a run stores
WEIGHTS = ("*.safetensors", "config.json")


@dataclass
class Run:
    """A plan being run: where its nodes are stored, what they share, and of which there is no model, and why."""

    plan: Plan
    cache: Path
    teachers: dict[str, Teacher] = field(default_factory=dict)
    missed: dict[Node, ReachError] = field(default_factory=dict)

    @cached_property
    def task(self) -> Task:
        """The plan's task, or the one the model was saved for."""
        if self.plan.task != "auto":
            return TASKS[self.plan.task]
        return infer_task(AutoConfig.from_pretrained(self.plan.source).to_dict())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies with the model."""
        try:
            return AutoTokenizer.from_pretrained(self.plan.source)
        except (OSError, ValueError) as error:
            raise DataError(f"model: no tokenizer can be loaded from {self.plan.model}: {error}") from error

    @cached_property
    def data(self) -> Data:
        """The plan's data, opened when first needed."""
        say(f"reading {self.plan.data.source}")
        return Data.open(self.plan.data, self.tokenizer, self.task)

    @cached_property
    def root_key(self) -> str:
        """Hash of all that every node hangs on."""
        shared = {
            "model": fingerprint(self.plan.source),
            "task": self.task.name,
            "target": self.plan.target.model_dump(),
            "data": self.data.fingerprint,
        }
        return digest(shared)

    def key(self, node: Node) -> str:
        """The content address of a node."""
        parents = [self.key(parent) for parent in node.parents] or [self.root_key]
        label = node.label if node.label in node.step.do.branches else ""  # a target's name makes no other model
        return digest([self.material(node), label, parents])

    def material(self, node: Node) -> list[str]:
        """What a node's result depends on beside its parents: its options, and the content of what they name."""
        return [node.step.key_material(), *map(fingerprint, node.step.do.sources)]

    def folder(self, node: Node) -> Path:
        """Where a node's state is stored once it is finished."""
        return self.cache / "nodes" / self.key(node)

    def go(self) -> list[Node]:
        """Run every node that is not stored yet, in order; return the leaves of the graph that have a model.

        Raises ReachError where none has.
        """
        nodes = self.plan.nodes()
        runs = [list(group) for _, group in groupby(nodes, key=lambda node: (node.number, node.parents))]
        for number, siblings in enumerate(runs, 1):
            if gone := next((parent for parent in siblings[0].parents if parent in self.missed), None):
                self.missed |= dict.fromkeys(siblings, self.missed[gone])
                continue
            missing = not all(self.folder(node).exists() for node in siblings)
            gather()  # all have looked before one writes
            if missing and (leads() or siblings[0].step.do.together):
                say(f"{siblings[0].step.name} ({number} of {len(runs)})")
                self._run(siblings)
            gather()
            found = {node: store.missed(self.folder(node)) for node in siblings}
            self.missed |= {node: reason for node, reason in found.items() if reason}
        made = [leaf for leaf in leaves(nodes) if leaf not in self.missed]
        if not made:
            raise ReachError("; ".join(dict.fromkeys(map(str, self.missed.values()))))
        return made

    @property
    def out_of_reach(self) -> dict[str, ReachError]:
        """Why there is no model, by the name of the branch that would have been of it."""
        return {leaf.branch: self.missed[leaf] for leaf in leaves(self.plan.nodes()) if leaf in self.missed}

    def state(self, node: Node | None) -> State:
        """The state after a node, or the plan's model before the first."""
        workshop = Workshop(self.cache / "work", self.cache)
        if node is not None:
            return store.recall(self.folder(node), self.plan.target, self.data, workshop, self.teacher)
        torch.manual_seed(self.plan.data.seed)  # a new head is made of random numbers
        model = self.task.load(self.plan.source, **self._head())
        dense = self.teacher(self.plan.source)
        return State(
            model, self.tokenizer, layout_of(model), self.task, self.plan.target, workshop, dense, self.data
        )  # fmt: skip

    def teacher(self, source: str) -> Teacher:
        """The dense model of a source, the same object each time, so that it is loaded once a run."""
        return self.teachers.setdefault(source, Teacher(source, self.task))

    def _head(self) -> dict[str, Any]:
        """What the model class must know of the labels where the checkpoint's head doesn't fit them."""
        labels = self.data.labels
        if labels is None and not self.data.regression:
            return {}
        count = len(labels) if labels else 1
        config = AutoConfig.from_pretrained(self.plan.source)
        saved_for = tuple(str(name) for name in config.architectures or ())
        if config.num_labels == count and any(name.endswith(self.task.endings) for name in saved_for):
            return {}
        names = dict(enumerate(labels or ["score"]))
        head = {"num_labels": count, "id2label": names, "label2id": {name: number for number, name in names.items()}}
        return head if labels else {**head, "problem_type": "regression"}

    def _run(self, siblings: list[Node]) -> None:
        """Run one pass, storing each model it yields as it comes."""
        step, parents = siblings[0].step, siblings[0].parents
        key = digest([self.material(siblings[0]), [self.key(parent) for parent in parents] or self.root_key])
        state = self.state(parents[0] if parents else None)
        state.others = tuple(self.state(parent) for parent in parents[1:])
        state.workshop = Workshop(self.cache / "work" / key, self.cache)
        state.workshop.step.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        for node, result in zip(siblings, step.do.run(state), strict=True):
            if isinstance(result, ReachError):
                say(f"{node.branch or step.name}: {result}")
                if leads():
                    store.miss(result, self.folder(node))
            else:
                self._keep(node, result, round(time.monotonic() - started, 2))
            release()
            started = time.monotonic()
        if leads():
            shutil.rmtree(state.workshop.step, ignore_errors=True)

    def _keep(self, node: Node, result: State, seconds: float) -> None:
        """Store a model that a pass has made, or with `keep_if` the better of that and the one before."""
        step, parents = node.step, node.parents
        result.forget_stale(step.do)
        missing = step.do.provides - {TEACHER} - {FACTS[name] for name in result.facts}
        if missing:
            raise RuntimeError(f"{step.name} promised {[fact.name for fact in missing]} and did not give it")
        if MASKS.name in result.facts:
            result.figures["zeros"] = found = zeros(result.model, result.facts[MASKS.name])
            if found["filled"]:
                raise RuntimeError(f"{step.name} promised to keep zeros and filled some: {found['filled']}")
        if not leads():
            return
        row = {
            "pass": step.name,
            "options": step.do.model_dump(mode="json"),
            "seconds": seconds,
            "kept": True,
            "reason": "",
            "figures": result.figures,
        }
        if step.keep_if is not None:
            before = self.state(parents[0] if parents else None)
            row |= self._verdict(step.keep_if, before, result)
            result = result if row["kept"] else before
        store.keep(result, self.folder(node), row)

    def _verdict(self, asked: KeepIf, before: State, after: State) -> dict[str, Any]:
        """Whether what a step made is taken, why, and the figures it was told by, as they stand in its row."""
        folder = after.workshop.step / "worth"
        shutil.rmtree(folder, ignore_errors=True)
        found = worth([exporter.do for exporter in self.plan.export], before, after, folder)
        kept, reason = asked.verdict(found.ratio, found.metric, found.scores, self.task.lower_is_better)
        return {"kept": kept, "reason": reason, "figures": {**after.figures, "worth": found._asdict()}}


def remembered(path: Path, compute: Callable[[], Any]) -> Any:
    """The JSON value stored at `path`, computed and stored where there is none."""
    if not path.exists():
        store.write_json(path, compute())
    return json.loads(path.read_text())


def fingerprint(source: str) -> str:
    """Hash of a file, of a local model's weights and config, or of all in another folder; a hub name is itself."""
    folder = Path(source).expanduser()
    if folder.is_file():
        with folder.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not folder.is_dir():
        return source
    whole = hashlib.sha256()
    weights = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    for path in sorted(weights or (path for path in folder.rglob("*") if path.is_file())):
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def prepare(out: Path, fresh: bool) -> Path:
    """Make the output folder, or take one that an earlier run of ours left; return its cache.

    Raises CompressError where it holds something else, or can't be written.
    """
    if problems := unusable(out):
        raise CompressError(f"out: {problems[0]}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in out.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / MARKER).touch()
        (out / CACHE).mkdir(exist_ok=True)
    except OSError as error:
        raise CompressError(f"out: {out} can't be written: {error.strerror or error}") from error
    return out / CACHE
