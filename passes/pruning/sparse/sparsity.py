"""What all passes that set single weights to zero have in common: how many, in which pattern, and what they leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from compress.contract import MASKS, Fact, Options, Part, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from compress.state import State
    from passes.pruning.sparse.pattern import Pattern


class Runs(Options):
    """N:M, so many weights kept of each run of inputs: YAML would read 2:4 as a number of minutes."""

    keep: int = Field(ge=1)
    of: int = Field(ge=2)

    @model_validator(mode="after")
    def _fewer(self) -> Runs:
        if self.keep >= self.of:
            raise ValueError(f"{self.keep} of {self.of} keeps all; expected keep below of, such as {{keep: 2, of: 4}}")
        return self


class Sparsifying(Pass):
    """Set weights of the linear layers of all blocks to zero; shapes, embeddings and heads stay as they are.

    What was zero by an earlier such step stays and counts: a later step with a larger `sparsity` goes on from there.
    """

    provides: ClassVar[frozenset[Fact]] = frozenset({MASKS})
    touches: ClassVar[Part] = Part.VALUES

    sparsity: float = Field(default=0.5, gt=0, lt=1, description="share of the weights that are zero")
    block: int = Field(default=1, ge=1, description="neighbouring inputs whose weights go together")
    runs: Runs | None = Field(default=None, description="keep so many of each run of inputs, in place of sparsity")

    @model_validator(mode="after")
    def _one_pattern(self) -> Sparsifying:
        if self.runs and "sparsity" in self.model_fields_set:
            raise ValueError("both sparsity and runs are given; expected one of them")
        if self.runs and self.block > 1:
            raise ValueError("runs have no block; expected block with sparsity")
        return self

    @property
    def pattern(self) -> Pattern:
        """Where zeros may lie."""
        from passes.pruning.sparse.pattern import Pattern

        if self.runs:
            return Pattern(1 - self.runs.keep / self.runs.of, of=self.runs.of)
        return Pattern(self.sparsity, block=self.block)

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with its weights sparse, and the masks as a fact."""
        former = dict(state.facts.get(MASKS.name, {}))
        masks, figures = self.sparsify(state, former)
        masks = {**former, **masks}
        state.give(MASKS, masks)
        state.figures = {**figures, "layers": {name: 1 - float(one.float().mean()) for name, one in masks.items()}}
        yield state

    def sparsify(self, state: State, former: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Make the model's matrices sparse; returns their masks by the names of the parameters, and figures.

        `former` are the masks that hold already.
        """
        raise NotImplementedError


def matrices(state: State, pattern: Pattern) -> tuple[dict[str, Any], dict[str, str]]:
    """The linear layers of all blocks that can have a pattern, each matrix once, and why others are left alone."""
    from passes.blocks import matrices_of
    from passes.watch import blocks_of

    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    seen: dict[int, str] = {}
    for block in blocks_of(state.layout):
        layers, shared = matrices_of(state.model, block, seen)
        skipped |= shared
        for name, layer in layers.items():
            seen[id(layer.weight)] = name
            if told := unfit(name, stored(layer, layer.weight).shape[1], pattern):
                skipped |= told
            else:
                found[name] = layer
    return found, skipped


def unfit(name: str, width: int, pattern: Pattern) -> dict[str, str]:
    """Why a matrix with so many inputs can't have the pattern, by its name; nothing where it can."""
    return {name: f"its {width} inputs are no multiple of {pattern.run}"} if width % pattern.run else {}


def stored(layer: Any, tensor: Tensor) -> Tensor:
    """A tensor (out, in) as the layer stores its weight, and the other way round."""
    from transformers.pytorch_utils import Conv1D

    return tensor.T.contiguous() if isinstance(layer, Conv1D) else tensor
