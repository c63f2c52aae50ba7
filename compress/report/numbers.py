"""The numbers of a report, with sensible units and as many figures as a reader can use."""

from __future__ import annotations

from compress.report.schema import Interval

ABSENT = "not measured"


def scaled(value: float | None, unit: str) -> str:
    """Write a count in thousands, millions and so on: ``22.7 M``, ``90.3 MB``."""
    if value is None:
        return ABSENT
    if value < 1000:
        return f"{value:.0f} {unit}".rstrip()
    for prefix in ("k", "M", "G", "T"):
        value /= 1000
        if value < 999.5 or prefix == "T":
            break
    return f"{value:.{digits(value)}f} {prefix}{unit}"


def digits(value: float) -> int:
    """Decimals that leave three figures to a number."""
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0


def duration(seconds: float | None) -> str:
    """Write seconds as a reader would say them: ``0.4 s``, ``48 s``, ``3 min 12 s``, ``1 h 04 min``."""
    if seconds is None:
        return ABSENT
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def latency(milliseconds: float | None) -> str:
    """Write milliseconds with three figures: ``0.412 ms``, ``28.1 ms``, ``1.93 s``."""
    if milliseconds is None:
        return ABSENT
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.{3 if milliseconds < 1 else digits(milliseconds)}f} ms"


def figure(value: float | None) -> str:
    """Write a quality with four significant figures."""
    if value is None:
        return ABSENT
    return f"{value:z.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(limits: Interval | None) -> str:
    """Write a quality's interval; empty where there is none."""
    return f"[{figure(limits[0])}, {figure(limits[1])}]" if limits else ""


def times(ratio: float | None) -> str:
    """Write a measured ratio: ``2.03x``."""
    return ABSENT if ratio is None else f"{ratio:.2f}x"


def error(worst: float | None) -> str:
    """The worst error of an artifact against its model."""
    return ABSENT if worst is None else "0, equal to the bit" if worst == 0 else f"{worst:.1e}"
