"""What `potluck fit` and `potluck simulate` share: a command that asks no pool, and is an application of its own.

Decides how such a command takes its options, and how it ends where it cannot be understood. It must not know what any of them does.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import typer

EXIT_USAGE: Final = 2


def application(name: str) -> typer.Typer:
    """One command without others below it; options may stand anywhere."""
    return typer.Typer(
        name=name,
        invoke_without_command=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"allow_interspersed_args": True},
        subcommand_metavar="",
    )


def option(help_text: str, *names: str) -> Any:
    """One whose help says what is there without it."""
    return typer.Option(*names, help=help_text, show_default=False)


def refuse(message: str) -> NoReturn:
    """Ends the command: what was asked cannot be done."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)
