"""The command line's frame: the application, its console and how it complains."""

from __future__ import annotations

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


def console(error: bool = False) -> Any:
    """Make a console that prints to the terminal."""
    from rich.console import Console

    return Console(stderr=error, highlight=False)


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
