"""On-policy: the student goes on with its texts in its own words, and is told from the teacher by those."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from compress.contract import Options

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class OnPolicy(Options):
    """How much of the training is on what the student writes itself, and how it does. Agarwal et al., arXiv:2306.13649.

    A student that learns from given texts alone never sees the teacher mend its own slips. No gradient goes through the
    drawing. It is validated on the data as it is.
    """

    fraction: float = Field(default=0.5, gt=0, le=1, description="share of the batches, each decided by lot")
    tokens: int = Field(default=64, ge=1, description="tokens that are written at most")
    temperature: float = Field(default=1.0, ge=0, description="1 draws as the student predicts, 0 takes the likeliest")

    def turn(
        self, batch: Mapping[str, Tensor], student: PreTrainedModel, ends: Collection[int]
    ) -> Mapping[str, Tensor]:
        """The batch as it is, or with the student's words in place of what followed its prompts.

        The lot and the words are drawn by torch's own random numbers, which training seeds for every batch.
        """
        import torch

        if torch.rand(()) >= self.fraction:
            return batch
        return own_words(batch, student, ends, self.tokens, self.temperature)


def own_words(
    batch: Mapping[str, Tensor], student: PreTrainedModel, ends: Collection[int], tokens: int, temperature: float
) -> dict[str, Tensor]:
    """A batch (rows, length) of texts whose beginnings are the given ones' and which the student wrote on.

    A prompt is what stands before the first label, or where all tokens have labels all but the last `tokens`. What was
    written has labels, what stands before has none.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from compress.data.batches import IGNORED
    from compress.runtimes.examples import longest_sequence
    from compress.writing import write_on

    lengths = batch["attention_mask"].sum(1)
    first = (batch["labels"] != IGNORED).int().argmax(1)
    starts = torch.where(first > 0, first, (lengths - tokens).clamp(min=1)).tolist()
    prompts = [row[:start].tolist() for row, start in zip(batch["input_ids"], starts, strict=True)]
    room = (longest_sequence(student) or 2**31) - max(starts)
    written = write_on(student, prompts, most=min(tokens, room), ends=ends, temperature=temperature)
    texts = [torch.tensor([*before, *after]) for before, after in zip(prompts, written, strict=True)]
    labels = [text.clone() for text in texts]
    for label, start in zip(labels, starts, strict=True):
        label[:start] = IGNORED
    home = batch["input_ids"].device
    parts = {"input_ids": (texts, 0), "attention_mask": ([torch.ones_like(text) for text in texts], 0)}
    parts["labels"] = labels, IGNORED
    return {
        name: pad_sequence(rows, batch_first=True, padding_value=pad).to(home) for name, (rows, pad) in parts.items()
    }
