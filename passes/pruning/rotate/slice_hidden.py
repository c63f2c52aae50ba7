"""Slice hidden: a narrower residual stream along its principal axes, without training (SliceGPT, arXiv:2401.15024)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from compress.contract import Part, Pass
from compress.errors import LayoutError, ReachError
from passes.pruning.speedups import each

if TYPE_CHECKING:
    from compress.state import State

STEPS = 64  # widths that are offered at least, where no alignment is given
COARSEST = 8  # alignment, where none is given


class SliceHidden(Pass):
    """Turn the residual stream to the principal axes of its states on calibration text, and keep the leading ones.

    Exactly one of `share`, `hidden` and `parameters` says how much. Heads, feed-forward columns and the cache stay as
    they are; the head of a language model gets a matrix of its own where it was that of the embedding. Takes pre-norm
    models. What comes out is a stock model where its config can tell the width: in families that have an entry for the
    size of a head, and at widths that are multiples of the number of heads where transformers asks so.

    All blocks have the same axes: axes for each need a matrix between neighbours, whose parameters are better spent on
    a wider stream.
    """

    named: ClassVar[str] = "slice_hidden"
    touches: ClassVar[Part] = Part.SHAPE | Part.VALUES

    share: float | None = Field(default=None, gt=0, lt=1, description="the share of the channels that goes, at least")
    hidden: int | None = Field(default=None, ge=2, description="width of the stream to keep")
    parameters: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the parameters to keep, those of embeddings and head not counted",
    )
    alignment: int | None = Field(
        default=None, ge=1, description="widths are multiples of it; left out, 8, or less in streams narrower than 512"
    )
    covariance: Literal["stream", "normalised"] = Field(
        default="normalised", description="of what the norms read, or of what they give before their gain"
    )
    samples: int = Field(default=128, ge=1, description="texts of the calibration split")
    batch_size: int = Field(default=8, ge=1, description="texts that are run at once")

    @model_validator(mode="after")
    def _one_amount(self) -> SliceHidden:
        given = [name for name in ("share", "hidden", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} says how much; expected share, hidden or parameters")
        if self.hidden is not None and self.alignment is not None:
            raise ValueError(f"hidden: {self.hidden} is the width itself; expected no alignment beside it")
        return self

    def run(self, state: State) -> Iterator[State | ReachError]:
        """Yield the state with the sliced model; figures tell the share of energy kept before each norm."""
        yield from each((state,), self._sliced)

    def _sliced(self, state: State) -> State:
        """That state."""
        from compress.data.calibration import calibration
        from compress.families import layout_of
        from compress.progress import track
        from compress.statistics import moments
        from compress.stream import width_of
        from passes.pruning.rotate.basis import basis, centre, even, kept_energy, of_length_one
        from passes.pruning.rotate.stream import stream_of
        from passes.pruning.rotate.turn import turned

        batches = list(calibration(state.data, self.samples, self.batch_size))
        stream = stream_of(state.model, state.layout, batches[0])
        width = self.width(state)
        view = of_length_one(stream.centred) if self.covariance == "normalised" else None
        read = moments(state.model, stream.norms, track(batches, "read the stream", len(batches)), view)
        grams = {norm: read[f"{norm}.gram"] for norm in stream.norms}
        covariances = {norm: centre(gram) if stream.centred else gram for norm, gram in grams.items()}
        axes = basis(even(list(covariances.values())), width, stream.centred)
        sliced = turned(state.model, state.layout, stream, axes)
        before, after = state.model.num_parameters(), sliced.num_parameters()
        more = "more parameters than before: the head no longer shares the matrix of the embedding"
        state.figures = {
            "width": {"before": width_of(state.model.config), "after": width},
            "energy_kept": {norm: kept_energy(one, axes) for norm, one in covariances.items()},
            "parameters": {"before": before, "after": after},
            "stock": not hasattr(sliced.config, "quantization_config"),
            "warnings": [more] if after > before else [],
        }
        state.model, state.layout = sliced, layout_of(sliced)
        return state

    def width(self, state: State) -> int:
        """The width to keep; LayoutError where the stream hasn't the one given, ReachError where none is so narrow."""
        from compress.uniform import HIDDEN
        from passes.pruning.uniform.shapes import space_of

        whole = state.model.config.hidden_size
        if self.hidden is not None:
            if self.hidden > whole:
                raise LayoutError(
                    f"slice_hidden: hidden is {whole} in this model; expected 2 to that, met {self.hidden}"
                )
            return self.hidden
        step = self.alignment or min(COARSEST, 2 ** max(0, int(math.log2(whole / STEPS))))
        offered = range(step, whole, step)
        if self.share is not None:
            asked, fitting = f"share {self.share:g}", [width for width in offered if width <= (1 - self.share) * whole]
        else:
            space = space_of(state.model, state.layout)
            counts = {width: space.parameters({**space.whole, HIDDEN: width}) for width in offered}
            asked, most = f"parameters {self.parameters:g}", (self.parameters or 1) * space.parameters(space.whole)
            fitting = [width for width, count in counts.items() if count <= most]
        if not fitting or fitting[-1] < 2:
            raise ReachError(
                f"slice_hidden: {asked} leaves no multiple of {step} of the {whole} channels; expected one"
            )
        return fitting[-1]
