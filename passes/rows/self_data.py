"""Self-data: the dense model says a data set's answers in its own words, which a pruned one learns more easily."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from textwrap import shorten
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from compress.contract import ROWS, TEACHER, Fact, Pass
from compress.errors import DataError

if TYPE_CHECKING:
    from compress.data.sources import Row
    from compress.state import State

REWRITTEN = ("train", "validation")  # the test split is for judging, so its answers are the data's own
NUMBER = r"-?\d(?:[\d,]*\d)?(?:\.\d+)?"
SHOWN, LONG = 2, 200  # examples of each outcome in the report, and the characters of a text there
QUESTION, ANSWER = "{question}", "{answer}"
REQUEST = f"""Answer the question below in your own words. A reference answer follows it; come to the same result.

Question: {QUESTION}

Reference answer: {ANSWER}"""


class SelfData(Pass):
    """Let the dense model rewrite the answers of questions with answers, for later steps to train on.

    It is asked by `request`, which holds the question and the answer as the data gives it. Where the result of what it
    writes, found by `result`, is another than that of the data's answer, the data's stays; so it does where the model
    comes to no end. Self-data distillation: Thangarasa et al., arXiv:2410.09982, after Yang et al., arXiv:2402.13669.
    """

    named: ClassVar[str] = "self_data"
    requires: ClassVar[frozenset[Fact]] = frozenset({TEACHER})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROWS})

    request: str = Field(
        default=REQUEST, description=f"what the model is asked, with {QUESTION} and, to be rewritten, {ANSWER}"
    )
    result: str | None = Field(
        default=NUMBER,
        description="pattern of a result: its last match counts, of that the first group; null: none is compared",
    )
    tokens: int = Field(default=256, ge=1, description="tokens of an answer at most")
    temperature: float = Field(default=0.0, ge=0, description="0 writes the likeliest token each time, 1 draws")
    batch_size: int = Field(default=16, ge=1, description="answers written at once")
    seed: int = Field(default=0, ge=0, description="of the draws")

    @field_validator("request")
    @classmethod
    def _asks(cls, given: str) -> str:
        if QUESTION not in given:
            raise ValueError(f"met {given!r}; expected a text with {QUESTION} in it")
        return given

    @field_validator("result")
    @classmethod
    def _pattern(cls, given: str | None) -> str | None:
        try:
            re.compile(given or "")
        except re.error as error:
            raise ValueError(f"met {given!r}; expected a regular expression: {error}") from error
        return given

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with the answers of training and validation rewritten."""
        from compress.devices import accelerated
        from passes.rows.rewriting import write_answers

        if not state.task.generates or any(row.label is None for row in state.data.split("train").rows):
            raise DataError(
                f"self_data: the data of {state.task.name} holds no answers to rewrite; expected text-generation, and "
                "data.label to name the column with the answer"
            )
        outcomes: Counter[str] = Counter()
        examples: dict[str, list[dict[str, str]]] = {}
        splits: dict[str, list[Row]] = {}
        for name in REWRITTEN:
            rows = state.data.split(name).rows
            with accelerated(state.dense.model):
                answers = write_answers(
                    state.dense.model, state.dense.tokenizer, [self.question(row) for row in rows],
                    state.workshop.step / name,
                    tokens=self.tokens, temperature=self.temperature, size=self.batch_size, seed=self.seed,
                )  # fmt: skip
            splits[name] = []
            for row, (text, lack) in zip(rows, answers, strict=True):
                reason = lack or self.objection(row.label, text)
                outcomes[reason] += 1
                if outcomes[reason] <= SHOWN:
                    told = {"question": " ".join(row.texts), "answer": str(row.label), "written": text}
                    shown = {what: shorten(one, LONG, placeholder="...") for what, one in told.items()}
                    examples.setdefault(reason or "rewritten", []).append(shown)
                splits[name].append(row if reason else replace(row, label=text))
        state.replace_rows(splits)
        state.figures |= {
            "rewritten": outcomes.pop("", 0),
            "kept": dict(outcomes),
            "examples": examples,
        }
        yield state

    def question(self, row: Row) -> str:
        """What the model is asked of a row; braces in its texts are let be."""
        parts = {QUESTION: "\n\n".join(row.texts), ANSWER: str(row.label)}
        return "".join(parts.get(part, part) for part in re.split(r"(\{question\}|\{answer\})", self.request))

    def objection(self, answer: str, text: str) -> str:
        """Why what the model wrote can't stand for an answer; empty where it can."""
        from passes.rows.rewriting import agree

        if not text:
            return "nothing written"
        return "" if self.result is None or agree(answer, text, self.result) else "another result"
