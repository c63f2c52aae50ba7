"""The roofline of the sparse kernels: operations a second over operations a byte, beside what the machine can do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, MARGIN = 760, 480, 60
X, Y = (0.1, 1000.0), (1.0, 10000.0)  # operations a byte; giga-operations a second
COLOURS = {"blocks": "#1f77b4", "bitmap": "#d62728", "bitmap16": "#2ca02c"}


def at(intensity: float, speed: float) -> tuple[float, float]:
    """Where a point lies in the picture, on logarithmic axes."""
    x = MARGIN + (WIDTH - 2 * MARGIN) * math.log(intensity / X[0]) / math.log(X[1] / X[0])
    y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * math.log(speed / Y[0]) / math.log(Y[1] / Y[0])
    return round(x, 1), round(y, 1)


def roof(peak: float, bandwidth: float, name: str) -> list[str]:
    """The line that no product whose matrix comes from memory can pass."""
    ridge = peak / bandwidth
    (x0, y0), (x1, y1), (x2, y2) = at(X[0], max(Y[0], X[0] * bandwidth)), at(ridge, peak), at(X[1], peak)
    return [
        f'<polyline points="{x0},{y0} {x1},{y1} {x2},{y2}" fill="none" stroke="#888"/>',
        f'<text x="{x2}" y="{y2 - 5}" text-anchor="end">{name}: {peak:.0f} G/s</text>',
    ]


def picture(rows: Sequence[Mapping[str, Any]], peaks: Mapping[str, float]) -> str:
    """An SVG with a point for every row of figures; the lines are of copies from memory, so caches lie above them."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *roof(peaks["int8_gops"], peaks["copy_gbs"], "int8"),
        *roof(peaks["float32_gops"], peaks["copy_gbs"], "float32"),
    ]
    for power in range(-1, 4):
        x, y = at(10.0**power, Y[0])
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(5):
        x, y = at(X[0], 10.0**power)
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{10**power}</text>')
    for row in rows:
        speed = row["operations"] / row["microseconds"] / 1e3
        x, y = at(row["operations"] / row["bytes"], speed)
        told = f"{row['kernel']} {row['inputs']}x{row['outputs']}, {row['rows']} rows, density {row['density']:g}"
        mark = f'<circle cx="{x}" cy="{y}" r="3" fill="{COLOURS[row["kernel"]]}" fill-opacity="0.6">'
        parts.append(f"{mark}<title>{told}: {speed:.0f} G/s</title></circle>")
    for number, (kind, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{MARGIN + 10}" y="{MARGIN + 16 * number}" fill="{colour}">{kind}</text>')
    middle, bottom = WIDTH / 2, HEIGHT - 20
    parts.append(
        f'<text x="{middle}" y="{bottom}" text-anchor="middle">operations on stored weights a byte of them</text>'
    )
    parts.append(f'<text x="{MARGIN}" y="{MARGIN - 20}">giga-operations a second, one thread</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
