"""The pictures of the page as inline SVG: bars, quality against speed, surviving heads and columns.

Widths are percentages and heights pixels, so that a picture fills its column while its letters keep their size; colours
are classes, which the page's style sheet sets for light and for dark. Text that wraps (names, reasons) is left to HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from compress.report.schema import Interval

CELLS = 96  # a strip never has more cells, whatever the number of columns
SHADES = 16  # steps of shading for a cell that stands for several columns
HEIGHT = 300  # pixels of the quality picture
LINE = 15  # pixels between two labels
ROW = 16  # squares in a row of heads
REACH = 8  # how far the quality picture follows marks before recovery, in spreads of the marks after it


@dataclass(frozen=True)
class Point:
    """A model in the quality picture: `before` is its quality before recovery; `kind` the class that colours it."""

    name: str
    speed: float
    quality: float
    speed_interval: Interval | None = None
    quality_interval: Interval | None = None
    before: float | None = None
    before_interval: Interval | None = None
    kind: str = "met"


@dataclass(frozen=True)
class Scale:
    """A linear map of values from `low`..`high` to 0..`length`, and the round values to mark."""

    low: float
    high: float
    length: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Where a value lies; what is outside lies on the border."""
        share = (value - self.low) / (self.high - self.low)
        return round(min(max(share, 0.0), 1.0) * self.length, 2)


def scale(values: Sequence[float], length: float, marks: int) -> Scale:
    """A scale that holds all values with a little air, about `marks` round ticks on it."""
    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    low, high = low - 0.08 * spread, high + 0.08 * spread
    power = 10.0 ** math.floor(math.log10((high - low) / marks))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= marks)
    ticks = (round(index * step, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1))
    return Scale(low, high, length, tuple(ticks))


def drawing(body: Iterable[str], label: str, attributes: str) -> Markup:
    """An SVG element that says to a screen reader what it shows; `body` must be escaped already."""
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {attributes}>{"".join(body)}</svg>')


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line; x in percent, y in pixels."""
    return f'<line x1="{x1}%" y1="{y1}" x2="{x2}%" y2="{y2}" class="{kind}"/>'


def bar(start: float, stop: float, limit: float, kind: str, label: str, spread: Interval | None = None) -> Markup:
    """A horizontal bar from `start` to `stop` on a track of length `limit`, with whiskers for an interval."""

    def across(value: float) -> float:
        return round(100 * min(value / limit, 1.0), 3) if limit else 0.0

    width = max(across(stop) - across(start), 0.3)
    body = [f'<rect x="{min(across(start), 99.7)}%" y="2" width="{width}%" height="12" rx="2" class="{kind}"/>']
    if spread:
        low, high = map(across, spread)
        body += [line(low, 8, high, 8, "whisker"), line(low, 4, low, 12, "whisker"), line(high, 4, high, 12, "whisker")]
    return drawing(body, label, 'class="bar" height="16"')


def quality(points: Sequence[Point], metric: str) -> Markup:
    """Quality (up) against speed-up (right) with intervals; a hollow mark is the model before its recovery."""
    limits = [point.speed for point in points] + [edge for one in points for edge in one.speed_interval or ()]
    right, up = scale([*limits, 1.0], 100, 7), scale(heights(points), HEIGHT, 6)
    body = []
    for tick in up.ticks:
        y = height(up, tick)
        body += [line(0, y, 100, y, "grid"), f'<text x="0" dx="-8" y="{y + 4}" class="tick end">{tick:g}</text>']
    for tick in right.ticks:
        body += [f'<text x="{right(tick)}%" y="{HEIGHT + 20}" class="tick middle">{tick:g}x</text>']
    body.append(line(0, HEIGHT, 100, HEIGHT, "axis"))
    for point in points:
        body += marks(point, right, up)
    body += labels(points, right, up)
    return drawing(body, f"{metric} against measured speed-up", f'class="quality" height="{HEIGHT + 28}"')


def height(up: Scale, value: float) -> float:
    """Where a quality lies, in pixels from the top."""
    return round(HEIGHT - up(value), 2)


def heights(points: Sequence[Point]) -> list[float]:
    """The qualities that the scale must hold; one far off before recovery must not squash the results."""
    after = [value for one in points for value in (one.quality, *(one.quality_interval or ()))]
    spread = max(after) - min(after) or abs(after[0])
    before = [value for one in points if one.before is not None for value in (one.before, *(one.before_interval or ()))]
    return after + [min(max(value, min(after) - REACH * spread), max(after) + REACH * spread) for value in before]


def marks(point: Point, right: Scale, up: Scale) -> Iterable[str]:
    """The mark of one model, its intervals, and the way from before its recovery."""
    x, y = right(point.speed), height(up, point.quality)
    if point.before is not None:
        start = height(up, point.before)
        yield line(x, start, x, y, f"way {point.kind}")
        if point.before_interval:
            yield line(x, height(up, point.before_interval[0]), x, height(up, point.before_interval[1]), "whisker")
        yield f'<circle cx="{x}%" cy="{start}" r="5" class="hollow {point.kind}"/>'
    if point.quality_interval:
        yield line(x, height(up, point.quality_interval[0]), x, height(up, point.quality_interval[1]), "whisker")
    if point.speed_interval:
        yield line(right(point.speed_interval[0]), y, right(point.speed_interval[1]), y, "whisker")
    yield f'<circle cx="{x}%" cy="{y}" r="5" class="{point.kind}"/>'


def labels(points: Sequence[Point], right: Scale, up: Scale) -> Iterable[str]:
    """A name above and beside each mark, moved down where it would cover a neighbour's."""
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: -one.quality):
        x, y = right(point.speed), height(up, point.quality) - 9
        while any(abs(x - other) < 22 and abs(y - height) < LINE for other, height in taken):
            y += 1
        taken.append((x, y))
        side = ("end", -7) if x > 70 else ("start", 7)
        name = point.name if len(point.name) <= 18 else point.name[:17] + "…"
        yield f'<text x="{x}%" dx="{side[1]}" y="{round(y, 2)}" class="name {side[0]}">{escape(name)}</text>'


def heads(dense: int, kept: Sequence[int], label: str) -> Markup:
    """One square a head, filled where it survived; rows of sixteen."""
    left = set(kept)
    body = []
    for head in range(dense):
        kind = "on" if head in left else "off"
        body.append(
            f'<rect x="{head % ROW * 12 + 1}" y="{head // ROW * 12 + 1}" width="10" height="10" class="{kind}"/>'
        )
    width, height = min(dense, ROW) * 12, math.ceil(dense / ROW) * 12
    return drawing(body, label, f'class="heads" width="{width}" height="{height}" viewBox="0 0 {width} {height}"')


def strip(dense: int, kept: Sequence[int], label: str) -> Markup:
    """Columns in the dense model's order; a cell is as dark as the share of its columns that survived."""
    cells = min(dense, CELLS)
    sizes, left = [0] * cells, [0] * cells
    for column in range(dense):
        sizes[column * cells // dense] += 1
    for column in kept:
        left[column * cells // dense] += 1
    # One path a shade, not one rectangle a cell: a page of 30 layers and four branches stays small.
    paths: dict[int, str] = {}
    for cell, (size, rest) in enumerate(zip(sizes, left, strict=True)):
        shade = math.ceil(SHADES * rest / size)
        if shade:
            paths[shade] = paths.get(shade, "") + f"M{cell} 0h1v1h-1z"
    body = (f'<path d="{path}" fill-opacity="{shade / SHADES:g}"/>' for shade, path in sorted(paths.items()))
    return drawing(body, label, f'class="strip" viewBox="0 0 {max(cells, 1)} 1" preserveAspectRatio="none"')
