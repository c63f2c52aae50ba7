"""Drop blocks: make a model shallower by the blocks, or the attention and feed-forward layers, that matter least."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compress.contract import TEACHER, Fact, Part, Pass
from compress.errors import DataError, LayoutError, ReachError
from passes.pruning.speedups import distinct, each, named_after, timed

if TYPE_CHECKING:
    from compress.measure import Ratio
    from compress.state import State
    from passes.pruning.depth.removal import Choose


class DropBlocks(Pass):
    """Remove the blocks that matter least, by what the model does on calibration text; nothing is trained.

    Exactly one of `remove`, `share` and `speedups` says how much. Every speed-up gives a branch with the fewest
    removals whose model, measured on the target, is so many times faster than the dense one.
    """

    named: ClassVar[str] = "drop_blocks"
    touches: ClassVar[Part] = Part.SHAPE

    score: Literal["greedy", "influence", "angular"] = Field(
        default="greedy",
        description="greedy: what raises the loss least, weighed anew after each removal (SLEB); influence: one minus "
        "the cosine of the states before and after (ShortGPT); angular: the range of consecutive blocks over which "
        "the state of the last token turns least (Gromov et al.)",
    )
    parts: Literal["blocks", "sub-blocks"] = Field(
        default="blocks", description="whole blocks, or the attention and feed-forward layers of each on their own"
    )
    remove: int | None = Field(default=None, ge=1, description="how many go")
    share: float | None = Field(default=None, gt=0, lt=1, description="the share that goes of all the model has")
    speedups: tuple[Annotated[float, Field(ge=1)], ...] | None = Field(
        default=None, min_length=1, description="as many go as make the model so many times faster than the dense one"
    )
    keep_first: int = Field(default=1, ge=0, description="blocks at the start of a stack that stay")
    keep_last: int = Field(default=1, ge=0, description="blocks at the end of a stack that stay")
    first_token: bool = Field(default=True, description="whether influence counts the first token of a text")
    samples: int = Field(default=128, ge=1, description="texts of the calibration split")
    batch_size: int = Field(default=8, ge=1, description="texts that are run at once")

    _distinct = field_validator("speedups")(distinct)

    @model_validator(mode="after")
    def _one_amount(self) -> DropBlocks:
        given = [name for name in ("remove", "share", "speedups") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} says how much; expected remove, share or speedups")
        if self.score == "angular" and self.parts == "sub-blocks":
            raise ValueError("score angular removes a range of blocks; expected parts: blocks")
        if not self.keep_first + self.keep_last:
            raise ValueError("keep_first and keep_last are 0; expected a block that stays")
        return self

    @property
    def requires(self) -> frozenset[Fact]:  # type: ignore[override]
        """The dense model is needed where speed is compared with it."""
        return frozenset({TEACHER}) if self.speedups else frozenset()

    @property
    def branches(self) -> tuple[str, ...]:
        """One model per speed-up, named after it where there are several."""
        return named_after(self.speedups or ())

    def run(self, state: State) -> Iterator[State | ReachError]:
        """Yield one shallower model, or one per speed-up; the figures name, in the dense model, what is gone."""
        choose, most = self.ranked(state)
        if self.speedups is None:
            yield self.shallower(state, choose, self.count(state, most), {})
            return
        measured: dict[int, tuple[float, Ratio]] = {}

        def ratio(count: int) -> float:
            from compress.measure import speedup
            from passes.pruning.depth.removal import removed

            if count not in measured:
                dense, candidate = timed(state, lambda: removed(state, choose(count)[0]))
                measured[count] = dense.milliseconds, speedup(dense, candidate)
            return measured[count][1].value

        def faster(times: float) -> State:
            count = min(most, bisect_left(range(most + 1), times, key=ratio))
            milliseconds, best = measured[count]
            if best.high < times:
                raise ReachError(
                    f"a speed-up of {times:g}x is out of reach on this target; "
                    f"without {most} {self.parts}, the most that can go, the model measures {best.value:.3g}x",
                    best.value,
                )
            met = best.value >= times
            missed = f"{times:g}x was promised; without {most} {self.parts} the model measured {best.value:.3g}x"
            figures = {
                "dense_milliseconds": milliseconds,
                "promised": times,
                "met": met,
                **_told(best),
                "attempts": [{"count": tried, **_told(found)} for tried, (_, found) in sorted(measured.items())],
                "warnings": [] if met else [missed],
            }
            return self.shallower(state, choose, count, figures)

        yield from each(self.speedups, faster)

    def ranked(self, state: State) -> tuple[Choose, int]:
        """What goes for each count, and the most that can; raises LayoutError where nothing can."""
        from compress.data.calibration import calibration
        from passes.pruning.depth.removal import by_angle, by_influence, by_loss, candidates

        parts = candidates(state.layout, self.parts, self.keep_first, self.keep_last)
        if not parts:
            lengths = ", ".join(f"{stack.length} in {name}" for name, stack in state.layout.stacks.items())
            raise LayoutError(
                f"no {self.parts} can go: blocks are {lengths}; "
                f"the first {self.keep_first} and the last {self.keep_last} stay, and what others depend on"
            )
        batches = list(calibration(state.data, self.samples, self.batch_size))
        if self.score == "angular":
            most = max(sum(part.startswith(f"{name}.") for part in parts) for name in state.layout.stacks)
            return by_angle(state, parts, batches), most
        if self.score == "influence":
            return by_influence(state, parts, batches, self.first_token), len(parts)
        return by_loss(state, parts, batches), len(parts)

    def count(self, state: State, most: int) -> int:
        """How many go by `remove` or `share`; raises LayoutError where they can't, or where a share is none."""
        blocks = sum(stack.length for stack in state.layout.stacks.values())
        all_parts = blocks if self.parts == "blocks" else sum(bool(axis.block) for axis in state.layout.axes.values())
        count = self.remove if self.share is None else round(self.share * all_parts)
        if not count or count > most:
            asked = f"remove {self.remove}" if self.share is None else f"share {self.share:g} of {all_parts}"
            raise LayoutError(f"{asked} is {count} {self.parts}; expected 1..{most} by what must stay in this model")
        return count

    def shallower(self, state: State, choose: Choose, count: int, figures: dict[str, Any]) -> State:
        """A branch without the `count` parts that go first, with its figures."""
        from compress.state import dense_name
        from passes.pruning.depth.removal import removed

        parts, scores = choose(count)
        if not all(map(math.isfinite, scores)):
            raise DataError("the model's states are not finite on the calibration text; expected finite ones")
        branch = removed(state, parts)
        gone: Sequence[str] = [dense_name(part, state.model) for part in parts]
        branch.figures = {"removed": gone, "scores": scores, **figures}
        return branch


def _told(ratio: Ratio) -> dict[str, float]:
    return {"measured": ratio.value, "low": ratio.low, "high": ratio.high}
