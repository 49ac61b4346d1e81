"""The report: an explanation as one self-contained HTML file. `data` holds its content, `html` its layout."""

from __future__ import annotations

from pkexplain.results.report._html import write_report

__all__ = ["write_report"]
