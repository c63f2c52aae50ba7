"""The table of everything at once, and what can be claimed of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.tables.words import Figures, heading, interval

Row = dict[str, Any]

CLAIMS: tuple[tuple[str, float, Callable[[Row], float]], ...] = (
    ("fastest at batch 1", 0.02, lambda row: row["batch_1"]["speedup"][0]),
    ("fastest at batch 32", 0.02, lambda row: row["batch_32"]["speedup"][0]),
    ("fastest at batch 1", 0.075, lambda row: row["batch_1"]["speedup"][0]),
    ("fastest at batch 32", 0.075, lambda row: row["batch_32"]["speedup"][0]),
    ("smallest", 0.01, lambda row: 1 / row["bytes"]),
)


def compound(found: Figures) -> Iterator[str]:
    """Every artifact, after what is chosen among them on validation."""
    dense, *_ = rows = found["rows"]
    whole = [row for row in rows if row["model"] == "dense"]
    yield "Chosen among all by the drop of accuracy on validation, against dense float32 in ONNX Runtime:"
    yield ""
    yield from heading(
        "what, and its largest drop", "artifact", "batch 1", "batch 32", "smaller", "accuracy, dev", "drop, dev"
    )
    for what, drop, worth in CLAIMS:
        for name, among in (("all", rows), ("dense ones", whole)):
            row = chosen(among, drop, worth)
            yield (
                f"| {what} of {name}, {100 * drop:g} % | {named(row)} | {row['batch_1']['speedup'][0]:.2f}x "
                f"| {row['batch_32']['speedup'][0]:.2f}x | {dense['bytes'] / row['bytes']:.1f}x "
                f"| {100 * row['accuracy']:.2f} | {100 * (1 - row['accuracy'] / dense['accuracy']):.2f} % |"
            )
    yield ""
    yield from heading(
        "structure", "runtime, weights", "MB", "ms", "batch 1", "batch 32", "accuracy, dev", "of dense", "on validation"
    )
    for row in rows:
        accuracy = interval(*(100 * value for value in (row["accuracy"], *row["accuracy_interval"])), 2)
        yield (
            f"| {row['structure']:g}x | {row['runtime']}, {row['precision']} | {row['bytes'] / 1e6:.1f} "
            f"| {row['batch_1']['milliseconds']:.2f} | {interval(*row['batch_1']['speedup'], 2)} "
            f"| {interval(*row['batch_32']['speedup'], 2)} "
            f"| {accuracy} | {100 * row['accuracy'] / dense['accuracy']:.1f} % "
            f"| {100 * row['validation_accuracy']:.2f} |"
        )


def chosen(rows: Sequence[Row], drop: float, worth: Callable[[Row], float]) -> Row:
    """The one worth most of those that lose no larger share of the first one's accuracy on validation."""
    least = (1 - drop) * rows[0]["validation_accuracy"]
    return max((row for row in rows if row["validation_accuracy"] >= least), key=worth)


def named(row: Row) -> str:
    """An artifact in words."""
    return f"{row['structure']:g}x narrower, {row['runtime']}, {row['precision']}"
