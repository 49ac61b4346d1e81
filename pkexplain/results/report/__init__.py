"""The report: an explanation as one self-contained HTML file. `data` says what is in it, `html` how it looks."""

from __future__ import annotations

from pkexplain.results.report._html import write_report

__all__ = ["write_report"]
