"""Formats of numbers, durations, sizes and untrusted text, in tables, plots and the report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

__all__ = ["TEXT_LIMIT", "WIDTH", "clean", "decimals", "fixed", "percent", "significant", "size", "wall_time"]


WIDTH = 100
"""Columns of the rendered text."""


def decimals(values: Iterable[float], digits: int = 4) -> int:
    """Choose the decimals that show the largest of some values with a number of significant digits.

    Args:
        values: Numbers to be shown in one column; those that are not finite are ignored.
        digits: Significant digits of the largest one.

    Returns:
        Decimals, 0 to 8.

    Example:
        >>> decimals([0.25, 12.5])
        2
    """
    scale = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if scale == 0.0:
        return digits - 1
    return min(8, max(0, digits - 1 - math.floor(math.log10(scale))))


def fixed(value: float, places: int, *, sign: bool = False) -> str:
    """Format a number with a fixed number of decimals, but never a small number as zero.

    Args:
        value: The number.
        places: Decimals.
        sign: Whether a positive number gets a plus sign.

    Returns:
        The number; in scientific notation if the decimals would round it to zero or it is too long to read.

    Example:
        >>> fixed(1234.5, 2, sign=True), fixed(4e-15, 3)
        ('+1,234.50', '4.0e-15')
    """
    if not math.isfinite(value):
        return "not finite"
    plus = "+" if sign else ""
    too_small = value != 0.0 and abs(value) < 0.5 * 10.0**-places
    if too_small or abs(value) >= 1e9:
        return f"{value:{plus}.1e}"
    return f"{value:{plus},.{places}f}" if value else f"{0.0:.{places}f}"


def significant(value: float, digits: int = 3) -> str:
    """Format a number with a number of significant digits; a dash for nan.

    Args:
        value: The number, or nan.
        digits: Significant digits.

    Returns:
        The number, for example ``"0.0123"``, ``"1,210"`` or ``"1.20e-05"``, or ``"–"`` for nan.
    """
    if math.isnan(value):
        return "–"
    rounded = float(f"{value:.{digits}g}")
    if 10**digits <= abs(rounded) < 10**6:
        return f"{rounded:,.0f}"
    return f"{value:#.{digits}g}".removesuffix(".")


def percent(share: float) -> str:
    """Format a share as a percentage with two significant digits, but never a small share as zero.

    Args:
        share: The share, 1 for all.

    Returns:
        For example ``"8.1%"``, ``"0.042%"`` or ``"100%"``.
    """
    if not math.isfinite(share):
        return "–"
    value = 100.0 * share
    if abs(value) >= 9.95:
        return f"{value:,.0f}%"
    return f"{value:#.2g}%" if value and abs(value) < 0.995 else f"{value:.1f}%"


def wall_time(seconds: float) -> str:
    """Format a duration with a suitable unit.

    Args:
        seconds: The duration.

    Returns:
        For example ``"12.3 ms"`` or ``"4.50 s"``.
    """
    if not seconds < 1e-3:
        return f"{significant(seconds)} s" if not seconds < 1.0 else f"{significant(seconds * 1e3)} ms"
    return f"{significant(seconds * 1e6)} µs"


def size(count: float) -> str:
    """Format a number of bytes.

    Args:
        count: Bytes, or nan.

    Returns:
        For example ``"12 MiB"``; a dash for nan.
    """
    return "–" if math.isnan(count) else f"{count / 2**20:,.0f} MiB"


TEXT_LIMIT = 20_000


def clean(text: str) -> str:
    """Make characters visible that a page cannot contain, or that would reorder the surrounding text.

    Args:
        text: Any text.

    Returns:
        The text, cut if it is very long, with such characters written as ``⟨U+202E⟩``.
    """
    cut = text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]} … (cut after {TEXT_LIMIT:,} characters)"
    hidden = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
    return re.sub(hidden, lambda found: f"⟨U+{ord(found[0]):04X}⟩", cut.replace("\r\n", "\n"))
