"""Vocabulary: drop the tokens that a domain's texts don't use, from the model and from its tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from compress.contract import VOCABULARY, Fact, Part, Pass
from compress.errors import DataError, LayoutError

if TYPE_CHECKING:
    import numpy as np

    from compress.data import Data
    from compress.state import State

COUNTED = ("train", "calibration", "validation")  # the test split is for judging


class Vocabulary(Pass):
    """Keep the tokens that the plan's texts use, and those without which some text can't be encoded.

    The most frequent tokens stay until they make up the share `coverage` of all that occur, or until there are `keep`
    of them; what must stay (special tokens, bytes or single characters, the parts that merges make a token of) counts
    as well. Texts of kept tokens are encoded as before, and the model computes the same for them; other texts take more
    tokens. Later steps, the teacher among them, see the new tokens. Abdaoui et al., arXiv:2010.05609.
    """

    provides: ClassVar[frozenset[Fact]] = frozenset({VOCABULARY})
    touches: ClassVar[Part] = Part.SHAPE

    coverage: float = Field(default=1.0, gt=0, le=1, description="share of the tokens met in the data that stay whole")
    keep: int | None = Field(default=None, ge=1, description="number of tokens at most; takes the place of `coverage`")

    @model_validator(mode="after")
    def _one_bound(self) -> Vocabulary:
        if self.keep is not None and self.coverage < 1:
            raise ValueError(f"keep: {self.keep} and coverage: {self.coverage:g} both bound the tokens; expected one")
        return self

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with model, tokenizer and data of the smaller vocabulary."""
        import torch

        from compress.vocabulary import cut_vocabulary, named_tokens, rows_of
        from passes.pruning.tokens import ids_of, indispensable, narrow, parts_of, state_of

        whole, tokenizer = state.data, state.tokenizer
        rows, size = rows_of(state.model), state.model.num_parameters()
        if tokenizer is None:
            raise DataError("vocabulary: the model has no tokenizer; expected tokenizer.json beside config.json")
        written = state_of(tokenizer)
        ids, counts = ids_of(written), occurrences(whole, rows)
        met = set(counts.nonzero()[0].tolist())
        special = {str(token) for token in tokenizer.all_special_tokens}
        needed = special | indispensable(written, [token for token, number in ids.items() if number in met])
        missing = sorted(token for token in needed if ids[token] >= rows)
        if missing:
            raise LayoutError(f"vocabulary: the model has {rows} rows, and none for '{missing[0]}' of its tokenizer")
        must = {ids[token] for token in needed} | named_tokens(state.model)
        kept = choose(counts, must, parts_of(written), self.coverage, self.keep)
        state.tokenizer = narrow(tokenizer, kept)
        cut_vocabulary(state.model, kept)
        state.data = whole.retokenized(state.tokenizer)
        former = state.facts.get(VOCABULARY.name)
        table = torch.tensor(kept)
        state.give(VOCABULARY, {"kept": table if former is None else former["kept"][table]})
        state.figures = {
            "tokens": {"before": rows, "met": len(met), "must_stay": len(must), "after": len(kept)},
            "parameters": {"before": size, "after": state.model.num_parameters()},
            "coverage": float(counts[kept].sum() / counts.sum()),
            "test_tokens": {"before": length(whole), "after": length(state.data)},
            "warnings": list(self.caveats(state)),
        }
        yield state

    def caveats(self, state: State) -> Iterator[str]:
        """What a reader of the report must know of scores after it."""
        yield (
            "likeness to the teacher is measured on texts as the kept tokens split them, the teacher's predictions "
            "taken among those; what the other splitting costs shows in scores against labels, and in `test_tokens`"
        )
        if state.task.packs:
            yield "perplexity is per token and among the kept tokens only, so it is not that of the dense vocabulary"


def length(data: Data) -> int:
    """How many tokens the test split has, of each text as many as are read."""
    return sum(len(sequence["input_ids"]) for sequence in data.split("test").encoded.sequences)


def occurrences(data: Data | None, rows: int) -> np.ndarray:
    """How often each of `rows` tokens occurs in the texts that count: (rows,)."""
    import numpy as np

    parts = [] if data is None else [data.split(name).encoded.sequences for name in COUNTED]
    texts = [sequence["input_ids"] for sequences in parts for sequence in sequences]
    if not texts:
        raise DataError("vocabulary: the plan has no texts; expected some of the domain")
    counts = np.bincount(np.concatenate(texts), minlength=rows)
    if len(counts) > rows:
        raise LayoutError(f"vocabulary: the texts hold token {len(counts) - 1}; the model has {rows}, counted from 0")
    return counts


def choose(
    counts: np.ndarray, must: Collection[int], parts: Mapping[int, Collection[int]], coverage: float, most: int | None
) -> list[int]:
    """The tokens that stay, ascending: what must, then the most frequent, each with all its `parts`.

    `counts` (tokens,) says how often each occurs. They are taken until they cover the share `coverage` of all
    occurrences; with a bound, those that would make more than `most` are passed over. Raises DataError where what must
    stay is more already.
    """
    import numpy as np

    kept = _with_parts(must, parts, set())
    if most is not None and len(kept) > most:
        raise DataError(f"vocabulary: keep is {most}; expected at least {len(kept)}, without which texts can't be read")
    covered, goal = int(counts[sorted(kept)].sum()), coverage * int(counts.sum())
    for token in np.argsort(-counts, kind="stable").tolist():
        if covered >= goal or not counts[token]:
            break
        further = _with_parts([token], parts, kept)
        if most is None or len(kept) + len(further) <= most:
            kept |= further
            covered += int(counts[sorted(further)].sum())
    return sorted(kept)


def _with_parts(tokens: Collection[int], parts: Mapping[int, Collection[int]], known: Collection[int]) -> set[int]:
    """Tokens with all that they are made of, and all that those are; without what is `known` already."""
    found, open_ones = set[int](), list(tokens)
    while open_ones:
        token = open_ones.pop()
        if token not in found and token not in known:
            found.add(token)
            open_ones += parts.get(token, ())
    return found
