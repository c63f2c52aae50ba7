"""Puzzle: the variant of every sub-block that a mixed-integer program picks for several budgets (arXiv:2411.19146)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compress.contract import TEACHER, Fact, Part, Pass
from compress.errors import DataError, ReachError
from passes.pruning.speedups import distinct, each, named_after

if TYPE_CHECKING:
    import numpy as np

    from compress.measure import Ratio
    from compress.state import State
    from passes.pruning.promise import Sizes
    from passes.pruning.replace.local import Library
    from passes.pruning.replace.mip import Search

    Choose = Callable[[Search], tuple[Sizes, dict[str, Any]]]

Offer = Annotated[float, Field(gt=0, le=1)] | Literal["linear", "none"]


class Puzzle(Pass):
    """Replace attention and feed-forward layers by smaller ones, by one Linear or by nothing, within the budgets given.

    Each variant is made without training and, with `local_steps`, taught alone to give what the parent's layer gave.
    Its score is what it alone does to the model's output; a mixed-integer program takes the variants of least summed
    score. Budgets may be mixed; at a fixed batch and sequence a speed-up is a throughput too.
    """

    touches: ClassVar[Part] = Part.SHAPE | Part.VALUES

    speedups: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        default=(), description="how many times faster than the dense model, as measured; several give a branch each"
    )
    parameters: float | None = Field(
        default=None, gt=0, le=1, description="share of the parameters outside of embeddings and head that may stay"
    )
    memory: float | None = Field(
        default=None, gt=0, le=1, description="share of the key-value cache that may stay, at the target's shape"
    )
    attention: tuple[Offer, ...] = Field(
        default=(0.75, 0.5, 0.25, "linear", "none"), description="besides the whole: shares of heads, linear, none"
    )
    ffn: tuple[Offer, ...] = Field(
        default=(0.75, 0.5, 0.25, 0.1, "linear", "none"),
        description="besides the whole: shares of columns, linear, none",
    )
    solutions: int = Field(default=1, ge=1, description="how many models that differ, a branch each")
    alpha: float = Field(default=0.8, ge=0, lt=1, description="share of sub-blocks that two solutions may have alike")
    local_steps: int = Field(default=0, ge=0, description="steps of local distillation of each variant; 0: none")
    learning_rate: float = Field(default=3e-4, gt=0, description="of Adam in local distillation")
    samples: int = Field(
        default=64, ge=2, description="calibration texts: one half to make variants from, one to score them by"
    )
    batch_size: int = Field(default=8, ge=1, description="texts at once")
    max_corrections: int = Field(default=3, ge=0, description="further models built and measured to meet a speed-up")
    tolerance: float = Field(default=0.01, ge=0, lt=1, description="share above the promised speed-up that is aimed at")

    _distinct = field_validator("speedups")(distinct)

    @model_validator(mode="after")
    def _budgeted(self) -> Puzzle:
        if not self.speedups and self.parameters is None and self.memory is None:
            raise ValueError("no budget; expected at least one of speedups, parameters and memory")
        if self.solutions > 1 and len(self.speedups) > 1:
            raise ValueError(f"{self.solutions} solutions of {len(self.speedups)} speed-ups; expected one speed-up")
        return self

    @property
    def requires(self) -> frozenset[Fact]:  # type: ignore[override]
        """The dense model is needed only to be compared with in speed."""
        return frozenset({TEACHER}) if self.speedups else frozenset()

    @property
    def branches(self) -> tuple[str, ...]:
        """One model per speed-up, named after it, or per solution, numbered from 1, where there are several."""
        if self.solutions > 1:
            return tuple(str(number) for number in range(1, self.solutions + 1))
        return named_after(self.speedups)

    def run(self, state: State) -> Iterator[State | ReachError]:
        """Yield the models chosen; figures tell each sub-block's variant, all scores and what stays of each budget."""
        from compress.data.calibration import calibration
        from passes.pruning.replace.local import library
        from passes.pruning.replace.replacement import cached_tokens, replacement_scores

        if self.memory is not None:
            cached_tokens(state)  # a model without a cache is refused before the long work
        batches = list(calibration(state.data, self.samples, min(self.batch_size, (self.samples + 1) // 2)))
        seen, unseen = batches[::2], batches[1::2]  # a fit looks too good on the very texts it was made from
        if not unseen:
            raise DataError("puzzle makes variants from some calibration texts and scores them by others; expected two")
        offers = {"heads": self.attention, "columns": self.ffn}
        made = library(state, offers, seen, self.local_steps, self.learning_rate)
        scores = replacement_scores(state, made.variants, unseen)
        search = self._search(state, made, scores)
        told = {"scores": made.told(scores), "local_losses": made.told(made.losses), "skipped": made.skipped}

        def solution(choose: Choose) -> State:
            nonlocal search
            choice, figures = choose(search)
            if self.solutions > 1:
                search = search.apart_from(choice)
            branch = made.built(state, choice)
            branch.figures = {**figures, **told, "kept": search.amounts(choice), "sizes": made.names(choice)}
            return branch

        yield from each(self._choices(state, made), solution)

    def _search(self, state: State, made: Library, scores: Mapping[str, np.ndarray]) -> Search:
        """The program with the amounts that its budgets need."""
        from compress.latency import table
        from compress.runtimes import example_inputs
        from passes.pruning.replace.mip import Search
        from passes.pruning.replace.replacement import cache, milliseconds, parameters

        batch, sequence = state.target.batch, state.target.sequence
        times, resources, limits = {}, {"parameters": parameters(state, made.variants)}, {}
        if self.parameters is not None:
            limits["parameters"] = self.parameters
        if self.memory is not None:
            resources["memory"] = cache(state, made.variants)
            limits["memory"] = self.memory
        if self.speedups:
            inputs = example_inputs(state.model, state.tokenizer, batch, sequence)
            measured = table(state.model, state.layout, state.target, inputs, state.workshop.run / "latency")
            times = milliseconds(measured, state, made.variants)
        sizes = {name: range(len(variants)) for name, variants in made.variants.items()}
        return Search(sizes, scores, times, resources, limits, self.alpha)

    def _choices(self, state: State, made: Library) -> list[Choose]:
        """For each branch what gives the number of each sub-block's variant, and figures of how it was found."""

        def best(search: Search) -> tuple[Sizes, dict[str, Any]]:
            choice = search.best()
            return choice, {"score": search.loss(choice)}

        if not self.speedups:
            return [best] * self.solutions
        from compress.measure import speedup
        from passes.pruning.promise import pursue
        from passes.pruning.speedups import timed, timed_as_given

        def trial(choice: Sizes) -> Ratio:
            return speedup(*timed(state, lambda: made.built(state, choice)))

        dense, present = timed_as_given(state)

        def promised(faster: float, search: Search) -> tuple[Sizes, dict[str, Any]]:
            promise = pursue(
                faster, search, search.search, trial,
                dense.milliseconds, present.milliseconds, self.max_corrections, self.tolerance,
            )  # fmt: skip
            choice, figures = promise.best.sizes, promise.figures()
            for attempt in figures["attempts"]:
                attempt["sizes"] = made.names(attempt["sizes"])
            return choice, {"dense_milliseconds": dense.milliseconds, **figures}

        return [partial(promised, faster) for faster in self.speedups * self.solutions]
