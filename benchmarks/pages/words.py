"""Numbers and values as the page writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LONGEST = 1500
"""Characters of a text from the data that are shown."""


def number(value: float | None, digits: int = 4) -> str:
    """To so many significant digits, thousands with commas; a power of ten only below 0.0001 and from 10^12 on."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'-' * (value < 0)}∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -5 < size < 12:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{_stripped(mantissa)}e{int(power)}"
    return _stripped(f"{value:,.{max(digits - 1 - size, 0)}f}")


def _stripped(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers at an axis, with as many digits as tell them apart: 5.07 and 5.075, not 5.07 and 5.08."""
    found: list[str] = []
    for digits in range(3, 9):
        found = [tick(value, digits) for value in values]
        if len(set(found)) == len(set(values)):
            break
    return found


def tick(value: float, digits: int = 3) -> str:
    """A number at an axis: 250, 40k, 1.2M, 5e-5."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return number(value / (unit if unit > 1e4 else 1e3), digits) + name
    return number(value, digits)


def duration(seconds: float) -> str:
    """3 h 20 min, 12 min 5 s, 41 s."""
    if seconds < 10:
        return f"{number(seconds, 2)} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def plain(value: Any) -> str:
    """An option's value: none as a dash, lists with spaces."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value)) or "–"
    return str(value)


def shortened(text: str, longest: int = LONGEST) -> str:
    """The beginning of a long text, and how much more there is."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text) - longest:,} more characters)"
