"""Figures and names as people read them, in few characters."""

from __future__ import annotations

NOTHING = "–"
"""Where there is nothing to tell."""

_ASCII = str.maketrans({"–": "-", "µ": "u", "·": "-", "█": "#", "░": ".", "…": "~", "°": " ", "×": "x"})


def in_ascii(text: str) -> str:
    """For terminals that have nothing else; as long as before."""
    return text.translate(_ASCII).encode("ascii", "replace").decode()


def count(value: float | None) -> str:
    """A number of things: 12, 1,234, 56.7k, 8.9M."""
    if value is None:
        return NOTHING
    for limit, divisor, unit in ((1e5, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (float("inf"), 1e9, "G")):
        if value < limit:
            return f"{value / divisor:,.1f}{unit}" if unit else f"{value:,.0f}"
    return NOTHING  # NaN


def rate(value: float | None) -> str:
    """Things a second: as `count`, but one decimal where there are few."""
    return f"{value:.1f}" if value is not None and 0 < value < 9.95 else count(value)


def percent(share: float | None) -> str:
    """A share as percent."""
    return NOTHING if share is None else f"{100 * share:.0f}%"


def size(num_bytes: float | None) -> str:
    """Memory: 512M, 1.4G, 141G."""
    if num_bytes is None:
        return NOTHING
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):.0f}M"
    gib = num_bytes / (1 << 30)
    return f"{gib:.1f}G" if gib < 99.95 else f"{gib:.0f}G"


def span(seconds: float | None) -> str:
    """A short time: 4.2 µs, 317 µs, 12 ms, 1.5 s."""
    if seconds is None:
        return NOTHING
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            value = seconds * factor
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds:.1f} s"


def duration(seconds: float) -> str:
    """A long time: 4.2s, 3:12, 5:03:12, 2d04h."""
    if seconds < 99.95:
        return f"{max(0.0, seconds):.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bar(share: float | None, width: int) -> str:
    """A share as a bar so many columns wide."""
    full = round(width * min(1.0, max(0.0, share or 0.0)))
    return "█" * full + "░" * (width - full)
