"""The state of a fast tokenizer narrowed to some of its tokens, which then splits their texts as it always did.

Why that holds: BPE applies, of the merges that fit, the one learnt first. A narrowed tokenizer has fewer merges but,
since with each token the parts of every merge that makes it stay, all that led to the kept tokens; so whatever was
first still is. WordPiece takes the longest piece, Unigram the likeliest path, and both had the same answer among more
candidates. A word that WordPiece can't spell may become one that it can, if what led it astray is gone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

State = dict[str, Any]  # tokenizer.json, read
KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how pieces that stand for a byte are written
ASCII = frozenset(map(chr, range(128)))


def state_of(tokenizer: PreTrainedTokenizerBase) -> State:
    """The state of a fast tokenizer; raises DataError where it is slow, or of a kind that can't be narrowed."""
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise DataError(f"vocabulary: {name} is a slow tokenizer; expected one with a tokenizer.json")
    state: State = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] not in KINDS:
        raise DataError(f"vocabulary: {name} is of kind {state['model']['type']}; expected one of {', '.join(KINDS)}")
    return state


def ids_of(state: State) -> dict[str, int]:
    """Every token and its id."""
    vocabulary = state["model"]["vocab"]
    if state["model"]["type"] == "Unigram":
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in state["added_tokens"]}}


def indispensable(state: State, occurring: Collection[str]) -> set[str]:
    """Tokens without which some text can't be encoded, or is not set in its frame.

    Special tokens; the 256 symbols or pieces for bytes where there are such; else single characters, of WordPiece
    those of ASCII and of the tokens `occurring`, in both their forms; the unknown token.
    """
    model, ids = state["model"], ids_of(state)
    tokens = {token["content"] for token in state["added_tokens"] if token["special"]}
    tokens.update(_framed(state["post_processor"]))
    tokens |= {token for token in ids if BYTE.fullmatch(token)}
    if state["padding"]:
        tokens.add(state["padding"]["pad_token"])
    if model.get("unk_token"):
        tokens.add(model["unk_token"])
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        tokens |= model["vocab"].keys() - {_joined(model, pair) for pair in model["merges"]}
    elif model["type"] == "WordPiece":
        letters = ASCII.union(*occurring)
        tokens |= letters | {model["continuing_subword_prefix"] + letter for letter in letters}
    elif model["type"] == "Unigram":
        tokens |= {piece for piece in ids if len(piece) == 1}
        # Unknown characters cost as much more than the unlikeliest piece, so that piece stays.
        tokens.add(min(model["vocab"], key=lambda entry: entry[1])[0])
        tokens |= {model["vocab"][model["unk_id"]][0]} if model["unk_id"] is not None else set()
    return tokens & ids.keys()


def parts_of(state: State) -> dict[int, set[int]]:
    """For each token that merges make, the tokens that they make it of."""
    ids, parts = ids_of(state), dict[int, set[int]]()
    for pair in state["model"].get("merges", ()):
        parts.setdefault(ids[_joined(state["model"], pair)], set()).update(ids[part] for part in pair)
    return parts


def narrowed(state: State, keep: Sequence[int]) -> State:
    """The state with only the tokens `keep`, ascending ids, numbered from 0 in their order."""
    places = {token: place for place, token in enumerate(keep)}
    ids = {token: places[number] for token, number in ids_of(state).items() if number in places}
    model = dict(state["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in places]
        model["unk_id"] = places.get(model["unk_id"])
    else:
        model["vocab"] = {token: ids[token] for token in model["vocab"] if token in ids}
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if {*pair, _joined(model, pair)} <= ids.keys()]
    added = [{**token, "id": places[token["id"]]} for token in state["added_tokens"] if token["id"] in places]
    frame = _renumbered(state["post_processor"], ids)
    padding = state["padding"] and {**state["padding"], "pad_id": ids[state["padding"]["pad_token"]]}
    return {**state, "model": model, "added_tokens": added, "post_processor": frame, "padding": padding}


def narrow(tokenizer: PreTrainedTokenizerBase, keep: Sequence[int]) -> PreTrainedTokenizerBase:
    """A tokenizer of the same class with only the tokens `keep`, read back as it would be from disk.

    Raises DataError where the class makes something else of the state it is given.
    """
    from transformers import AutoTokenizer

    state = narrowed(state_of(tokenizer), keep)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if made.get_vocab() != ids_of(state):
        raise DataError(f"vocabulary: {type(tokenizer).__name__} doesn't take other tokens than its own")
    return made


def _joined(model: Mapping[str, Any], pair: Sequence[str]) -> str:
    """The token that a merge makes."""
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


def _framed(frame: Any) -> Iterator[str]:
    """The tokens that a post-processor sets round a text, wherever it names one beside its id."""
    if isinstance(frame, dict):
        yield from frame["tokens"] if "ids" in frame else ()
        frame = list(frame.values())
    if isinstance(frame, list):
        yield from frame[:1] if _is_pair(frame) else ()
        for part in frame:
            yield from _framed(part)


def _renumbered(frame: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor with the ids that its tokens have in `ids`."""
    if isinstance(frame, dict):
        renewed = {name: _renumbered(part, ids) for name, part in frame.items()}
        return {**renewed, "ids": [ids[token] for token in frame["tokens"]]} if "ids" in frame else renewed
    if isinstance(frame, list):
        return [frame[0], ids[frame[0]]] if _is_pair(frame) else [_renumbered(part, ids) for part in frame]
    return frame


def _is_pair(entry: list[Any]) -> bool:
    """Whether a list is a token and its id, as BERT's and RoBERTa's post-processors hold them."""
    return [type(part) for part in entry] == [str, int]
