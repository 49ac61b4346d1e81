"""Tables of measured figures, written into docs/figures.md between the markers of each benchmark."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import numpy as np
import torch

PAGE = Path(__file__).parent.parent / "docs" / "figures.md"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values, unit: str = "", digits: int = 2) -> str:
    """Median, with the 5th and 95th percentile."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.05, 0.5, 0.95])
    scale, sign = (100, "%") if unit == "%" else (1, unit)
    return f"{middle * scale:.{digits}g}{sign} ({low * scale:.{digits}g} to {high * scale:.{digits}g})"


def machine() -> str:
    threads = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    return f"{threads}, torch {torch.__version__}, {platform.machine()}"


def write(name: str, text: str) -> None:
    """Print the figures and put them in their place on the page."""
    print(text, flush=True)
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"docs/figures.md has no place for {name}: add {begin} and {end}")
    PAGE.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page), encoding="utf-8")
