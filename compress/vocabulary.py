"""The vocabulary of a model: which of its rows can't go, and the one way to cut the others, wherever they are held.

transformers names the embedding of the inputs and the head of the outputs. Their weights and biases are often held by
several modules at once (tied embeddings, a head's bias in BERT), so the cut goes by identity: whatever parameter is one
of theirs is put anew in every module that holds it, and what was tied stays tied. The kept rows keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import LayoutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRY = "_token_id"  # how the names of config entries end that hold one token, or a list of them
FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens")  # lists of tokens that may as well be gone


def cut_vocabulary(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Keep only the tokens `keep` of a model, in place: token ``keep[i]`` is token i afterwards.

    Embedding, head and biases lose rows; `vocab_size`, padding and the token ids in the configs follow. For texts of
    kept tokens the model computes what it did. Raises LayoutError where `keep` lacks a token that the model names.
    """
    rows, keep = rows_of(model), sorted(set(keep))
    gone = sorted(named_tokens(model) - set(keep))
    if gone or not 0 <= keep[0] <= keep[-1] < rows:
        met = f"token {gone[0]} of its config left out" if gone else f"tokens {keep[0]}..{keep[-1]} of {rows}"
        raise LayoutError(f"vocabulary: met {met}; expected tokens of the model, and all that its config names")
    _cut_rows_(model, torch.tensor(keep))
    places = {token: place for place, token in enumerate(keep)}
    for module in model.modules():
        if getattr(module, "vocab_size", None) == rows:
            module.vocab_size = len(keep)  # type: ignore[assignment]  # torch types attributes as tensor or module
        if isinstance(padding := getattr(module, "padding_idx", None), int):
            module.padding_idx = places.get(padding, padding)  # type: ignore[assignment]
    for config in _configs(model):
        if getattr(config, "vocab_size", None) == rows:
            config.vocab_size = len(keep)
        for name, value in _tokens_in(config):
            setattr(config, name, _mapped(value, places, rows))


def rows_of(model: PreTrainedModel) -> int:
    """The number of tokens a model has rows for; LayoutError where it reads none."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise LayoutError(f"vocabulary: {type(model).__name__} reads no tokens; expected an embedding of tokens")
    return embedding.num_embeddings


def named_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that a model names in its configs, or counts by: they can't go.

    RoBERTa and its kin number positions from the padding token on, so all tokens up to it keep their places.
    """
    rows, embedding = rows_of(model), model.get_input_embeddings()
    named = {
        token
        for config in _configs(model)
        for name, value in _tokens_in(config)
        if name not in FORBIDDEN
        for token in (value if isinstance(value, list) else [value])
    }
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            named |= {module.padding_idx} if module.weight is embedding.weight else set(range(module.padding_idx + 1))
    return {token for token in named if 0 <= token < rows}


def _cut_rows_(model: PreTrainedModel, index: Tensor) -> None:
    """Put the rows `index` (kept,) of embedding and head in place of the whole, in every module that holds them."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    parts = {
        id(whole): nn.Parameter(whole.detach().index_select(0, index.to(whole.device)), whole.requires_grad)
        for end in ends
        for whole in end.parameters(recurse=False)
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in parts:
                setattr(module, name, parts[id(parameter)])
                declared = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
                if hasattr(module, declared):
                    setattr(module, declared, len(index))


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config that a model or a module of it holds, each once."""
    held = [getattr(module, name, None) for module in model.modules() for name in ("config", "generation_config")]
    return list({id(config): config for config in held if config is not None}.values())


def _tokens_in(config: Any) -> Iterator[tuple[str, int | list[int]]]:
    """The entries of a config that hold tokens."""
    for name, value in list(vars(config).items()):
        if (name.endswith(ENTRY) or name in FORBIDDEN) and isinstance(value, int | list):
            yield name, value


def _mapped(value: int | list[int], places: Mapping[int, int], rows: int) -> int | list[int] | None:
    """Tokens by their new places: those gone are left out of lists, those the model never had have none."""
    if isinstance(value, list):
        return [places[token] for token in value if token in places]
    return places[value] if 0 <= value < rows else None
