"""Merge: one model of several that were recovered from the same one, each by another recipe or on other data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from compress.contract import Part, Pass
from compress.errors import LayoutError

if TYPE_CHECKING:
    from compress.state import State


class Merge(Pass):
    """Put every weight between those of the models that `after` names, which must be of one shape.

    `slerp` goes round the sphere, from the first model towards the second, from there towards the third and so on, in
    steps after which each has had its share; the order matters little as long as the models are near. `average` goes
    straight, which is their weighted mean. Slerp of recoveries: Thangarasa et al., arXiv:2410.09982, section 3.
    """

    merges: ClassVar[bool] = True
    touches: ClassVar[Part] = Part.VALUES

    method: Literal["slerp", "average"] = Field(default="slerp", description="round the sphere, or straight")
    weights: tuple[float, ...] | None = Field(
        default=None, description="what each model counts, in the order of `after`; left out, all the same"
    )

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, given: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if given is not None and (min(given, default=0) < 0 or not sum(given)):
            raise ValueError(f"met {list(given)}; expected numbers of 0 or more, one of them above 0")
        return given

    def refusal(self, models: int) -> str:
        """Why it can't take so many models; empty where it can."""
        if models < 2:
            return "takes two or more models; expected their names"
        if self.weights and len(self.weights) != models:
            return f"has {len(self.weights)} weights; expected one for each"
        return ""

    def run(self, state: State) -> Iterator[State]:
        """Yield the first model's state with the weights of all."""
        import torch

        from passes.merging.between import angle_between, lerp, slerp

        for number, other in enumerate(state.others, 2):
            refuse_unlike(state, other, number)
        weights = self.weights or (1.0,) * (1 + len(state.others))
        shares = [
            weight / so_far if so_far else 0.0 for weight, so_far in zip(weights, accumulate(weights), strict=True)
        ]
        between = slerp if self.method == "slerp" else lerp
        theirs = [dict(other.model.named_parameters()) for other in state.others]
        angles = []
        with torch.no_grad():
            for name, weight in state.model.named_parameters():
                angles += [float(angle_between(weight, one[name]).nan_to_num()) for one in theirs]
                for parameters, share in zip(theirs, shares[1:], strict=True):
                    weight.copy_(between(weight, parameters[name], share))
        degrees = torch.tensor(angles).rad2deg()
        state.figures |= {
            "models": len(weights),
            "degrees": {"mean": float(degrees.mean()), "most": float(degrees.max())},
        }
        yield state


def refuse_unlike(state: State, other: State, number: int) -> None:
    """Raise LayoutError where model `number` is not what the first is: of other weights, units, blocks or tokens."""
    from compress.record import record_of

    mine, theirs = ({name: tuple(one.shape) for name, one in each.model.named_parameters()} for each in (state, other))
    for name in (*mine, *theirs):
        if mine.get(name) != theirs.get(name):
            met = " and ".join(
                f"{'absent from' if name not in shapes else f'{shapes[name]} in'} {which}"
                for shapes, which in ((mine, "the first model"), (theirs, f"number {number}"))
            )
            raise LayoutError(f"merge: '{name}' is {met}; expected models of one shape")
    for axis in (*state.kept, *other.kept):
        if state.kept.get(axis) != other.kept.get(axis):
            raise LayoutError(
                f"merge: of '{axis}' other units are left in model number {number} than in the first; expected models "
                "recovered from the same pruned one"
            )
    blocks = [record_of(each.model.config)["blocks"] for each in (state, other)]
    if blocks[0] != blocks[1]:
        raise LayoutError(
            f"merge: model number {number} is left with the blocks {blocks[1]}, the first with {blocks[0]}; expected "
            "models recovered from the same pruned one"
        )
    vocabularies = [None if each.tokenizer is None else each.tokenizer.get_vocab() for each in (state, other)]
    if vocabularies[0] != vocabularies[1]:
        raise LayoutError(f"merge: model number {number} has other tokens than the first; expected the same")
