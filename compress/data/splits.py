"""Splits: rows divided so that no text stands in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from compress.data.options import DataOptions
from compress.data.sources import Row
from compress.errors import DataError

SPLITS = ("calibration", "train", "validation", "test")
HELD_ROWS = 2000  # of a split at most that is held out of the source, where nothing is said


def split_rows(
    rows: Sequence[Row], held: Mapping[str, Sequence[Row]], options: DataOptions, *, running: bool = False
) -> dict[str, list[Row]]:
    """Divide `rows` among the splits that `held` (rows of separate validation and test sources) doesn't give.

    Equal texts go together. They are dealt by a seeded hash of their content, so that the order of the source plays
    no part; running text is cut in ranges instead. Texts of the test rows are left out of all else, those of the
    validation rows out of the training and calibration rows. Raises DataError where a split would be empty.
    """
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    spoken_for: set[str] = set()
    for name in ("test", "validation"):
        if name in held:
            found = [row for row in held[name] if text_key(row) not in spoken_for]
            splits[name] = found[: getattr(options, f"{name}_rows")]
            spoken_for.update(map(text_key, held[name]))
    keyed = [(text_key(row), row) for row in rows]
    keys = [key for key in dict.fromkeys(key for key, _ in keyed) if key not in spoken_for]
    if not running:
        keys.sort(key=lambda key: digest(f"{options.seed} {key}"))
    home = deal(keys, [name for name in SPLITS if name not in held], options)
    for key, row in keyed:
        if key in home:
            splits[home[key]].append(row)
    empty = [name for name in SPLITS if not splits[name]]
    if empty:
        raise DataError(f"data.{empty[0]}: every row of it is also in the test rows")
    return splits


def deal(keys: Sequence[str], names: Sequence[str], options: DataOptions) -> dict[str, str]:
    """Return the split of each key: training first, then the held-out splits, each at least one key."""
    if len(keys) < len(names):
        raise DataError(
            f"data.source: {options.source} has {len(keys)} different texts left; "
            f"at least {len(names)} are needed for {', '.join(names)}"
        )
    share = max(1, int(options.held_share * len(keys)))
    sizes = {name: min(getattr(options, f"{name}_rows") or HELD_ROWS, share) for name in names if name != "train"}
    rest = len(keys) - sum(sizes.values())
    home = dict.fromkeys(keys[:rest][: options.train_rows], "train")
    for name, size in sizes.items():
        home.update(dict.fromkeys(keys[rest : rest + size], name))
        rest += size
    return home


def text_key(row: Row) -> str:
    """The content hash by which rows are equal: of a question its context, of all else the texts, spaces aside."""
    texts = row.texts[-1:] if isinstance(row.label, Mapping) else row.texts
    return digest("\x00".join(" ".join(text.split() if isinstance(text, str) else text) for text in texts))


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
