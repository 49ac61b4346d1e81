"""Draws assets/logo.svg: a path of coloured pieces whose rises stack up to the whole.

The curve is a training run, its height the model's output. Each piece of the curve and the block of its colour on the
right rise by the same amount, and the blocks add up to the difference between start and end.

Usage: python assets/draw_logo.py
"""

from __future__ import annotations

import math
from pathlib import Path

SIZE = 128.0
# Mid tones, to be seen on white and on black alike.
COLORS = ["#0d9488", "#22b8a7", "#3b9eea", "#6d6af0", "#f97316"]
LEFT, RIGHT, BOTTOM, TOP = 11.0, 94.0, 16.0, 112.0
STROKE = 12.0
BAR_LEFT, BAR_WIDTH = 103.0, 16.0
GAP = 3.0  # between two pieces, and between two blocks
BEND = 1.9  # how early the curve rises: the larger, the more it looks like a run that converges


def point(s: float) -> tuple[float, float]:
    """The curve at s from 0 to 1, y upwards: (1 − exp(−bend s)), scaled to end at the top."""
    rise = (1 - math.exp(-BEND * s)) / (1 - math.exp(-BEND))
    return LEFT + (RIGHT - LEFT) * s, BOTTOM + (TOP - BOTTOM) * rise


def piece(start: float, end: float, color: str) -> str:
    """The curve from `start` to `end`, as a fine polyline."""
    steps = [start + (end - start) * i / 16 for i in range(17)]
    line = " ".join(f"{x:.2f},{SIZE - y:.2f}" for x, y in map(point, steps))
    return f'<polyline points="{line}" stroke="{color}"/>'


def block(low: float, high: float, color: str) -> str:
    """One block of the stack, as high as its piece rises."""
    return (
        f'<rect x="{BAR_LEFT:g}" y="{SIZE - high:.2f}" width="{BAR_WIDTH:g}" height="{high - low:.2f}" rx="2.5" '
        f'fill="{color}"/>'
    )


def main() -> None:
    """Write the file beside this script."""
    n = len(COLORS)
    pieces, blocks = [], []
    for i, color in enumerate(COLORS):
        start, end = i / n, (i + 1) / n
        (x0, y0), (x1, y1) = point(start), point(end)
        cut = GAP / 2 / math.hypot(x1 - x0, y1 - y0) / n  # half a gap, measured along the curve
        first, last = i == 0, i == n - 1
        pieces.append(piece(start + (0 if first else cut), end - (0 if last else cut), color))
        blocks.append(block(y0 + (0 if first else GAP / 2), y1 - (0 if last else GAP / 2), color))
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE:g} {SIZE:g}" role="img" aria-label="pkexplain">',
        "<title>pkexplain</title>",
        f'<g fill="none" stroke-width="{STROKE:g}">',
        *pieces,
        "</g>",
        *blocks,
        "</svg>",
    ]
    Path(__file__).with_name("logo.svg").write_text("\n".join(svg) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
