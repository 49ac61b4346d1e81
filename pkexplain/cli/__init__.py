"""The command line: thin, over what Python users call."""

from pkexplain.cli._arguments import parse_output
from pkexplain.cli._commands import app, main

__all__ = ["app", "main", "parse_output"]
