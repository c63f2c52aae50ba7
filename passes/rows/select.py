"""Select: of the training texts those stay that the dense model knows better than a small one does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from textwrap import shorten
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.contract import ROWS, TEACHER, Fact, Pass
from compress.errors import DataError

if TYPE_CHECKING:
    from compress.state import State

SHOWN, LONG = 2, 200  # texts of each end in the report, and their characters there


class Select(Pass):
    """Keep the share of the training texts in which the dense model is furthest ahead of a small reference.

    A text is as good as ``(log p(x) - log q(x)) / tokens`` is large, p being the dense model and q the reference: what
    both know is easy, and noise is what neither does. Both score once, before training. Difference sampling: MiniPLM,
    arXiv:2410.17215, section 3.2.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({TEACHER})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROWS})

    reference: str = Field(description="folder or hub name of a small model of the same tokens that learned such texts")
    share: float = Field(default=0.5, gt=0, lt=1, description="share of the training rows that stays")
    batch_size: int = Field(default=32, ge=1, description="texts that are scored at once")

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with fewer rows to train on."""
        from transformers import AutoTokenizer

        from compress.devices import accelerated
        from passes.rows.scoring import mean_log_likelihoods

        if not state.task.generates:
            raise DataError(f"select: texts are weighed as text-generation reads them; met {state.task.name}")
        vocabulary = AutoTokenizer.from_pretrained(self.reference).get_vocab()
        if state.tokenizer is None or vocabulary != state.tokenizer.get_vocab():
            raise DataError(f"select: {self.reference} reads other tokens than the model; expected one tokenizer")
        part = state.data.split("train")
        models = {"dense": state.teacher, "reference": state.task.load(self.reference).eval()}
        scores = []
        for name, model in models.items():
            with accelerated(model):
                scores.append(mean_log_likelihoods(model, part, state.workshop.step / name, self.batch_size))
        gains = {
            row: one - other
            for row, (one, other) in enumerate(zip(*scores, strict=True))
            if one is not None and other is not None
        }
        order = sorted(gains, key=lambda row: -gains[row])
        kept = sorted(order[: math.ceil(self.share * len(order))])
        state.replace_rows({"train": [part.rows[row] for row in kept]})
        ends = [" ".join(map(str, part.rows[row].texts)) for row in (*order[:SHOWN], *order[-SHOWN:])]
        texts = [shorten(text, LONG, placeholder="...") for text in ends]
        state.figures |= {
            "rows": {"before": len(part.rows), "after": len(kept)},
            "gain": {"before": sum(gains.values()) / len(gains), "after": sum(gains[row] for row in kept) / len(kept)},
            "examples": {"most": texts[:SHOWN], "least": texts[SHOWN:]},
        }
        yield state
