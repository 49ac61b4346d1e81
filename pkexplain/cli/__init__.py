"""The command line: a thin layer over the Python interface."""

from pkexplain.cli._arguments import parse_output
from pkexplain.cli._commands import app, main

__all__ = ["app", "main", "parse_output"]
