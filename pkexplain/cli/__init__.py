"""The command line: a thin layer over the Python interface."""

from pkexplain.cli import _commands, _upkeep  # noqa: F401 - each adds its commands to the application
from pkexplain.cli._app import app, main
from pkexplain.cli._arguments import parse_output

__all__ = ["app", "main", "parse_output"]
