"""Fold: remove the blocks a model needs least, let like neighbours share their matrices, and heal what that cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from compress.contract import TEACHER, Fact, Part, Pass
from compress.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.layout import Stack
    from compress.state import State


class Fold(Pass):
    """Remove `remove` blocks, then let runs of `group` blocks compute with the matrices of their first.

    The first and the last block of a stack stay as they are. Sharing divides what is stored, not what is computed.
    Norms stay private, and so are deltas of rank `cure` on every shared matrix, trained with the norms towards the
    teacher's last states and predictions. FoldGPT, arXiv:2407.00928.
    """

    touches = Part.SHAPE | Part.VALUES

    remove: int = Field(default=0, ge=0, description="blocks to take out, over all stacks")
    rank: Literal["gates", "cosine"] = Field(
        default="gates", description="what tells the blocks needed least: trained gates, or input and output alike"
    )
    group: int = Field(default=2, ge=1, description="neighbouring blocks with one set of matrices; 1 shares nothing")
    groups: int | None = Field(
        default=None,
        ge=1,
        description="groups in each stack at most, the most similar; left out, as many as have room",
    )
    samples: int = Field(default=128, ge=1, description="calibration rows that gates and similarities are read from")
    batch_size: int = Field(default=16, ge=1, description="rows a batch, also when curing")
    gate_steps: int = Field(default=100, ge=1, description="updates of the gates")
    gate_learning_rate: float = Field(default=0.05, gt=0, description="of the gates' scalars, which start at 1")
    penalty: float = Field(default=0.1, gt=0, description="weight of the mean gate beside the model's relative error")
    cure: int = Field(default=8, ge=0, description="rank of the deltas on shared matrices; 0 leaves them as they are")
    cure_steps: int = Field(default=200, ge=1, description="updates of deltas and norms")
    cure_learning_rate: float = Field(default=1e-3, gt=0, description="its peak, for deltas and norms")
    seed: int = Field(default=0, ge=0, description="of the deltas and of the order of the data")

    @model_validator(mode="after")
    def _something_to_cure(self) -> Fold:
        if self.group == 1 and self.cure and "cure" in self.model_fields_set:
            raise ValueError(f"cure: {self.cure} heals shared blocks and group: 1 shares none; expected cure: 0")
        return self

    @property
    def requires(self) -> frozenset[Fact]:  # type: ignore[override]
        """The teacher is for curing."""
        return frozenset({TEACHER}) if self.cure and self.group > 1 else frozenset()

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with the model folded."""
        from compress.data.calibration import calibration
        from compress.recipe import TrainingOptions
        from compress.record import own_record, prefix_of, record_of
        from compress.sharing import share_
        from passes.pruning.depth.cure import cure

        if record_of(state.model.config).keys() & {"shared", "cured"}:
            raise LayoutError("fold: this model is folded already; expected one whose blocks share nothing")
        batches = list(calibration(state.data, self.samples, self.batch_size))
        if self.remove:
            state.figures |= self._remove(state, batches)
        if self.group > 1:
            figures, groups = self._groups(state, batches)
            state.figures |= figures
            start = len(prefix_of(state.model))  # the record names blocks as in the base model
            plain = [[block[start:] for block in group] for group in groups]
            shared = {block: group[0] for group in plain for block in group[1:]}
            share_(state.model, own_record(state.model), shared)
            if self.cure:
                recipe = TrainingOptions(
                    steps=self.cure_steps,
                    batch_size=self.batch_size,
                    learning_rate=self.cure_learning_rate,
                    dropout=False,
                    seed=self.seed,
                )
                state.figures |= cure(state, [block for group in plain for block in group], self.cure, recipe)
        yield state

    def _remove(self, state: State, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Drop the blocks that are needed least; figures name them as they were before."""
        from passes.pruning.depth.gates import similarities, train_gates

        names = [f"{stack.module}.{index}" for stack in state.layout.stacks.values() for index in inner(stack)]
        if self.remove > len(names):
            raise LayoutError(
                f"fold: remove: {self.remove} blocks asked, {len(names)} stand between the first and the last"
            )
        blocks = [state.model.get_submodule(name) for name in names]
        if self.rank == "gates":
            options = {"learning_rate": self.gate_learning_rate, "penalty": self.penalty}
            needed = train_gates(state.model, blocks, batches, steps=self.gate_steps, **options).tolist()
        else:
            needed = [1 - cosine for cosine in similarities(state.model, blocks, batches)]
        scores = dict(zip(names, needed, strict=True))
        lost = sorted(names, key=scores.__getitem__)[: self.remove]
        for name, stack in state.layout.stacks.items():
            keep = [index for index in range(stack.length) if f"{stack.module}.{index}" not in lost]
            state.drop(name, keep)
        return {"scores": {name: round(score, 6) for name, score in scores.items()}, "removed": lost}

    def _groups(self, state: State, batches: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Any], list[list[str]]]:
        """What to report, and the blocks of each group, the most similar there are in every stack."""
        from compress.sharing import alike
        from passes.pruning.depth.gates import similarities

        stacks = [[f"{stack.module}.{i}" for i in inner(stack)] for stack in state.layout.stacks.values()]
        blocks = {name: state.model.get_submodule(name) for names in stacks for name in names}
        similar = dict(zip(blocks, similarities(state.model, list(blocks.values()), batches), strict=True))
        groups: list[list[str]] = []
        for names in stacks:
            fits = [[alike(blocks[one], blocks[other]) for other in names] for one in names]
            runs = partition([similar[name] for name in names], self.group, fits, self.groups)
            groups += [[names[place] for place in run] for run in runs]
        if not groups:
            lengths = ", ".join(str(stack.length) for stack in state.layout.stacks.values())
            raise LayoutError(
                f"fold: group: {self.group} like neighbours asked, and between the first and the last block there are "
                f"fewer; the stacks have {lengths} blocks"
            )
        return {"similarity": {name: round(one, 6) for name, one in similar.items()}, "groups": groups}, groups


def inner(stack: Stack) -> range:
    """The blocks that may go or share: not the first, nor the last, nor those the others lean on."""
    return range(max(1, stack.anchored), stack.length - 1)


def partition(
    similar: Sequence[float], size: int, fits: Sequence[Sequence[bool]], most: int | None = None
) -> list[range]:
    """Runs of `size` neighbouring places, as many as there is room for, or `most`, and among those the most similar.

    ``similar[i]`` tells how similar the places i - 1 and i are, ``fits[i][j]`` whether i and j may stand in one run.
    """
    best: list[dict[int, tuple[float, list[range]]]] = [{0: (0.0, [])}]  # per number of places from the left, per runs
    for end in range(1, len(similar) + 1):
        choices, run = dict(best[-1]), range(end - size, end)
        if run.start >= 0 and all(fits[run.start][place] for place in run):
            alike = sum(similar[run.start + 1 : end])
            for count, (total, runs) in best[run.start].items():
                longer = (total + alike, [*runs, run])
                choices[count + 1] = max(choices.get(count + 1, longer), longer, key=lambda one: one[0])
        best.append(choices)
    room = max(best[-1])
    return best[-1][room if most is None else min(most, room)][1]
