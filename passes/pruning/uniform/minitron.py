"""Minitron: a plain smaller model by forward-only importance, its shape chosen after a short recovery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.contract import TEACHER, Fact, Part, Pass
from compress.errors import ReachError
from passes.pruning.speedups import each

if TYPE_CHECKING:
    from compress.state import State
    from passes.pruning.uniform.candidates import Cutter
    from passes.pruning.uniform.shapes import Shape

SIZES = ("hidden", "columns", "heads", "blocks")
MARGIN = 0.02  # how far above a speed-up the search aims, as a share, so that noise doesn't break it
ROUNDS = 4  # shapes that are measured at most to find the share of parameters that gives a speed-up


class Minitron(Pass):
    """Shrink every block alike, and the residual stream with them, so that stock transformers loads what comes out.

    How small is told by `parameters`, by `speedup` or by the sizes themselves. For a budget, `candidates` shapes that
    lie near it are cut, trained for `recovery_steps` towards the dense model, and ranked by their validation loss:
    before any recovery the ranking means nothing. The best comes out with the weights it has recovered so far. Width
    is what shrinks unless `axes` says otherwise: under 15B parameters it costs less than depth; the heads stay, or go
    with the hidden width in families whose config tells no size of a head. (Muralidharan et al., arXiv:2407.14679.)
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({TEACHER})
    touches: ClassVar[Part] = Part.SHAPE | Part.VALUES

    parameters: float | None = Field(
        default=None, gt=0, lt=1, description="share of the parameters to keep, those of embeddings not counted"
    )
    speedup: float | None = Field(default=None, gt=1, description="times faster than dense, measured on the target")
    hidden: int | None = Field(default=None, ge=1, description="width of the residual stream")
    columns: int | None = Field(default=None, ge=1, description="columns of each feed-forward layer")
    heads: int | None = Field(default=None, ge=1, description="heads of each attention; key-value heads if grouped")
    blocks: int | None = Field(default=None, ge=1, description="number of blocks")
    axes: tuple[Literal["hidden", "columns", "heads", "blocks"], ...] = Field(
        default=("hidden", "columns"), min_length=1, description="what may shrink to come under a budget"
    )
    alignment: int | None = Field(
        default=None, ge=1, description="widths are multiples of it; left out, the power of two up to a 16th of each"
    )
    candidates: int = Field(default=4, ge=1, description="shapes that are compared")
    samples: int = Field(default=1024, ge=1, description="texts of the calibration split that importance is read from")
    batch_statistic: Literal["l2", "mean", "variance"] = Field(
        default="l2", description="aggregates importance over texts"
    )
    sequence_statistic: Literal["l2", "mean", "variance"] = Field(
        default="mean", description="aggregates importance over the tokens of a text"
    )
    depth: Literal["influence", "perplexity"] = Field(
        default="influence", description="ranks blocks by how far they turn the stream, or by the loss without them"
    )
    add_back: bool = Field(
        default=False, description="whether the last heads kept take in the first ones removed; not for grouped queries"
    )
    rescale: bool = Field(
        default=False, description="whether RMS norms make up for the channels gone; of use where nothing is recovered"
    )
    recovery_steps: int = Field(default=100, ge=0, description="weight updates before shapes are ranked")
    batch_size: int = Field(default=32, ge=1, description="rows a batch of the recovery")
    learning_rate: float = Field(default=2e-4, gt=0, description="of the recovery, its peak")
    validation_rows: int = Field(default=512, ge=1, description="rows that a validation looks at, drawn once")
    seed: int = Field(default=0, ge=0, description="of the order of the recovery's data")

    @model_validator(mode="after")
    def _one_aim(self) -> Minitron:
        aims = [name for name in ("parameters", "speedup") if getattr(self, name) is not None]
        aims += ["sizes"] if self.sizes else []
        if len(aims) != 1:
            met = " and ".join(aims) or "none"
            raise ValueError(f"expected one of parameters, speedup, or sizes ({', '.join(SIZES)}); met {met}")
        if not self.recovery_steps and not self.sizes and self.candidates > 1:
            raise ValueError("recovery_steps 0 can't rank shapes; expected candidates: 1, or some recovery_steps")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the plan gives."""
        return {name: size for name in SIZES if (size := getattr(self, name)) is not None}

    def run(self, state: State) -> Iterator[State | ReachError]:
        """Yield the candidate of least validation loss; its figures tell of all of them."""
        yield from each((state,), self._best)

    def _best(self, state: State) -> State:
        """That candidate."""
        from passes.pruning.uniform.candidates import Cutter, recover
        from passes.pruning.uniform.shapes import space_of

        space = space_of(state.model, state.layout)
        cutter = Cutter.of(self, state, space)
        best, chosen, rows = None, dict[str, Any](), list[dict[str, Any]]()
        for index, shape in enumerate(self._shapes(cutter)):
            branch, row = cutter.cut(shape), {"shape": shape, "parameters": space.parameters(shape)}
            rows.append(row)
            if self.speedup is not None:
                row["speedup"] = cutter.speedup(branch)
                if row["speedup"] < self.speedup:
                    continue
            if self.recovery_steps:
                row |= recover(self, branch, state.workshop.step / f"candidate-{index}")
            if best is None or row["loss_after"] < chosen["loss_after"]:
                best, chosen = branch, row
        if best is None:
            fastest = max(row["speedup"] for row in rows)
            raise ReachError(
                f"a speed-up of {self.speedup:g}x is out of reach on this target; "
                f"the fastest shape measures {fastest:.3g}x",
                fastest,
            )
        told = {"promised": self.speedup, "measured": chosen["speedup"], "met": True} if self.speedup else {}
        best.figures = {
            **told,
            **chosen,
            "dense_shape": space.whole,
            "dense_parameters": space.parameters(space.whole),
            "candidates": rows,
            "ranked_by": "validation loss after recovery" if len(rows) > 1 else "nothing: one shape",
        }
        return best

    def _shapes(self, cutter: Cutter) -> list[Shape]:
        """The shapes to compare."""
        if self.sizes:
            return [cutter.space.complete(self.sizes)]
        if self.parameters is not None:
            return self._near(cutter, self.parameters, self.candidates)
        goal, share, ratio = self.speedup or 1.0, 1.0, 1.0
        for _ in range(ROUNDS):
            share *= ratio / (goal * (1 + MARGIN))
            try:
                ratio = cutter.speedup(cutter.cut(self._near(cutter, share, 1)[0]))
            except ReachError:
                smallest = cutter.space.smallest(self.axes, self.alignment, cutter.fits)
                if cutter.speedup(cutter.cut(smallest)) >= goal:
                    raise  # it is fast enough, but no shape lies near the right size
                return [smallest]
            if goal <= ratio <= goal * (1 + 3 * MARGIN):
                break
        return self._near(cutter, share, self.candidates)

    def _near(self, cutter: Cutter, share: float, most: int) -> list[Shape]:
        """Shapes with about this share of the parameters."""
        return cutter.space.candidates(share, self.axes, self.alignment, most, cutter.fits)
