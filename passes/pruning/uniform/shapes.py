"""Uniform shapes of a model: their parameters, and which of them come under a budget.

A shape gives the ``hidden`` width, the ``columns`` and key-value ``heads`` of every block, and the number of
``blocks``. Its parameters are a polynomial in these four, read off the model's own parameters once, so that a grid of
thousands of shapes is counted in no time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from compress.errors import LayoutError, ReachError
from compress.layout import Layout
from compress.uniform import HIDDEN, places, spans, tied_to_heads

Shape = dict[str, int]
Term = tuple[bool, tuple[tuple[int, str, int], ...]]  # in a block?, (places that stay, width, places per unit) per dim

NEAR = 0.05  # how far, as a share, a candidate's parameters may lie from the budget
STEPS = 16  # sizes a width is offered in at least, where no alignment is given
MOST_CUT = 0.5  # of a width in one go; beyond it several steps with a recovery each are the published advice


@dataclass(frozen=True)
class Space:
    """The shapes of one model: its own, and the polynomial that counts the parameters beside the embeddings."""

    whole: Shape
    terms: Mapping[Term, int]
    per_head: int  # channels of the stream for each unit of heads where these go together, else 0

    def parameters(self, shape: Mapping[str, Any]) -> Any:
        """Parameters but those of embeddings and of the output projection; arrays of sizes give an array."""
        total: Any = 0
        for (inside, dims), times in self.terms.items():
            part: Any = times * shape["blocks"] // self.whole["blocks"] if inside else times
            for stays, name, per_unit in dims:
                part = part * (stays + per_unit * shape[name] if name else stays)
            total = total + part
        return total.astype(int) if isinstance(total, np.ndarray) else int(total)

    def complete(self, given: Mapping[str, int]) -> Shape:
        """A shape from some sizes, the others being the model's own; LayoutError for what the model hasn't got."""
        for name, size in given.items():
            if not 1 <= size <= self.whole[name]:
                raise LayoutError(
                    f"minitron: {name} is {self.whole[name]} in this model; expected 1 to that, met {size}"
                )
        shape = {**self.whole, **given}
        if self.per_head and HIDDEN in given:
            shape["heads"] = shape[HIDDEN] // self.per_head
        if self.per_head and shape["heads"] * self.per_head != shape[HIDDEN]:
            raise LayoutError(
                f"minitron: this family has {self.per_head} hidden channels for each head; expected `hidden` to be a "
                f"multiple of that and `heads` left out, met hidden {shape[HIDDEN]} with {shape['heads']} heads"
            )
        return shape

    def candidates(
        self, share: float, names: Sequence[str], alignment: int | None, most: int, fits: Callable[[Shape], bool]
    ) -> list[Shape]:
        """At most `most` shapes with about `share` of the parameters, the evenest first and then the most unlike ones.

        Only the widths `names` shrink, to multiples of `alignment`, and only shapes that pass `fits` count. Raises
        ReachError where none comes near.
        """
        columns, kept = self._grid(share, names, alignment)
        near = np.abs(kept / share - 1) <= NEAR
        if not near.any():
            closest = kept[np.argmin(np.abs(kept - share))]
            raise ReachError(
                f"minitron: no shape keeps {share:.3g} of the parameters within {NEAR:.0%} by shrinking "
                f"{', '.join(names)}; the nearest keeps {closest:.3g}: give a finer alignment or more axes"
            )
        shapes = [dict(zip(columns, map(int, row), strict=True)) for row in np.stack(list(columns.values()), 1)[near]]
        shares = np.array([[shape[name] / self.whole[name] for name in names] for shape in shapes])
        evenness = shares.std(1) + np.abs(kept[near] / share - 1)
        left, chosen = list(range(len(shapes))), list[int]()
        while left and len(chosen) < most:
            if chosen:
                gaps = np.linalg.norm(shares[left][:, None] - shares[chosen], axis=2).min(1)
                best = left.pop(int(np.argmax(gaps)))
            else:
                best = left.pop(int(np.argmin(evenness[left])))
            if fits(shapes[best]):
                chosen.append(best)
        if not chosen:
            raise ReachError(f"minitron: transformers refuses every shape that keeps {share:.3g} of the parameters")
        return [shapes[one] for one in chosen]

    def smallest(self, names: Sequence[str], alignment: int | None, fits: Callable[[Shape], bool]) -> Shape:
        """The shape of fewest parameters; the model's own where none else fits."""
        columns, kept = self._grid(0.0, names, alignment)
        shapes = ({name: int(sizes[place]) for name, sizes in columns.items()} for place in np.argsort(kept))
        return next(filter(fits, shapes), self.whole)

    def _grid(
        self, share: float, names: Sequence[str], alignment: int | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The sizes (shapes,) by width of all shapes that are offered, and the share of the parameters of each."""
        offers = [self._offer(name, share, alignment) if name in names else [size] for name, size in self.whole.items()]
        columns = dict(zip(self.whole, np.array(list(product(*offers))).T, strict=True))
        if self.per_head:
            columns["heads"] = columns[HIDDEN] // self.per_head
        return columns, self.parameters(columns) / self.parameters(self.whole)

    def _offer(self, name: str, share: float, alignment: int | None) -> list[int]:
        """The sizes of a width that shrinks, its own included."""
        size = self.whole[name]
        if name == HIDDEN and self.per_head:
            step = self.per_head
        elif name in ("heads", "blocks"):
            step = 1
        else:
            step = alignment or 2 ** max(0, int(math.log2(size / STEPS)))
        least = math.ceil(min(MOST_CUT, share) * size)
        return sorted({size, *(multiple for multiple in range(step, size, step) if multiple >= least)})


def space_of(model: PreTrainedModel, layout: Layout) -> Space:
    """The shapes that a model can take; LayoutError where its blocks aren't alike."""
    whole = {HIDDEN: model.config.hidden_size, "columns": 0, "heads": 0, "blocks": 0}
    for kind in ("columns", "heads"):
        sizes = {axis.units for axis in layout.axes.values() if axis.kind == kind}
        if len(sizes) != 1:
            raise LayoutError(
                f"minitron: the {kind} of this model are {sorted(sizes)}; expected one number for all blocks"
            )
        whole[kind] = sizes.pop()
    whole["blocks"] = sum(stack.length for stack in layout.stacks.values())
    heads = next(axis for axis in layout.axes.values() if axis.kind == "heads")
    per_head = places(heads) * heads.entries[0][1] if tied_to_heads(model, layout) else 0
    return Space(whole, _terms(model, layout), per_head)


def _terms(model: PreTrainedModel, layout: Layout) -> Mapping[Term, int]:
    """How often each product of sizes stands among the parameters, embeddings left out."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables |= {id(module.weight) for module in [model.get_output_embeddings()] if module is not None}
    terms: Counter[Term] = Counter()
    found, blocks = spans(model, layout), tuple(f"{stack}." for stack in layout.stacks)
    for name, parameter in model.named_parameters():
        if id(parameter) not in tables:
            dims = [(size, "", 0) for size in parameter.shape]
            for span in found[name]:
                axis = layout.axes.get(span.name)
                units, kind = (axis.units, axis.kind) if axis else (model.config.hidden_size, HIDDEN)
                dims[span.dim] = (parameter.shape[span.dim] - span.width * units, kind, span.width)
            terms[name.startswith(blocks), tuple(dims)] += 1
    return terms
