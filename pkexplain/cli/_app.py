"""The command line's frame: the application, its console and how it complains."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from pkexplain.errors import PkexplainError

app = typer.Typer(
    name="pkexplain",
    help="Which training examples made this model say this, by how much, and does it add up?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The directory of a recorded run, or its URL.")]


_WIDTH_IN_A_FILE = 1000


def console(error: bool = False) -> Any:
    """Make a console that prints to the terminal; in a file or a pipe, no table is cut and no text is wrapped."""
    from rich.console import Console

    screen = Console(stderr=error, highlight=False)
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = _WIDTH_IN_A_FILE
    return screen


def complain(word: str, text: str) -> None:
    """Print an error; brackets in its text, as in ``pkexplain[demo]``, are not markup."""
    from rich.markup import escape

    console(error=True).print(f"[bold red]{word}[/bold red] {escape(text)}", soft_wrap=True)


def main() -> None:
    """Run the command line; an error of ours is shown as its message, with exit status 1."""
    try:
        app()
    except PkexplainError as error:
        complain("error:", str(error))
        sys.exit(1)
