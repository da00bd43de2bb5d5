"""The tree of sub-commands below `potluck`.

Decides which there are: the ones here, and those that roles register under the entry point group `potluck.commands`. It must not import a
role before it is asked for, because each needs an extra that may not be installed.
"""

from __future__ import annotations

import errno
import io
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Final, NoReturn

import typer

from potluck.commands import access, chat, demo, deployments, explaining, models, money, pool, tiers, up
from potluck.commands.output import guard_output
from potluck.commands.terminal import EXIT_FAILED, EXIT_USAGE, explain, install_command, say
from potluck_protocol.errors import PotluckError
from potluck_protocol.version import package_version

ENTRY_POINT_GROUP: Final = "potluck.commands"
WORD_CHARACTERS_SHOWN: Final = 80
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""Of the disk, or of this user's share of it: such a failure names no file."""

ROOT_HELP: Final = """Volunteers pool their GPUs; together they serve open-weight language models.

    potluck up              a whole pool on this machine, with a small model
    potluck chat "Hello"    ask it something

Commands find the pool by --url or POTLUCK_URL, and your key by --api-key-file or POTLUCK_API_KEY; on the coordinator's own machine both are
found by themselves. Exit codes: 0 done, 1 failed, 2 wrong usage, 4 not authorised, 5 unreachable, 141 nobody reads the output any more."""


def run(app: typer.Typer) -> NoReturn:
    """Runs this process's command line; ends by SystemExit with its code. A file or folder that cannot be used, or is full, is named."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal has no letters for is spelled out: it must not end a command that has done its work.
            stream.reconfigure(errors="backslashreplace")
    guard_output()
    try:
        sys.exit(app())
    except PotluckError as error:
        sys.exit(explain(error))
    except UnicodeEncodeError as error:
        # Of a word on the command line: the calls take text only. Files may have any name.
        say(f"error: {str(error.object)[:WORD_CHARACTERS_SHOWN]!r} is not text in UTF-8.")
        sys.exit(EXIT_USAGE)
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        say(f"error: {place}{error.strerror or error}")
        sys.exit(EXIT_FAILED)


def build_app(wanted: str | None) -> typer.Typer:
    """The command tree. Of the roles' commands only the wanted one is loaded; all of them where help is wanted."""
    app = typer.Typer(name="potluck", help=ROOT_HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_root)
    app.command("up", short_help="Run a whole pool on this machine.")(up.up)
    app.command("demo", short_help="Start a pool, ask it one question, stop it.")(demo.demo)
    app.command("chat", short_help="Ask a model of the pool.")(chat.chat)
    app.add_typer(models.models_app, name="models", short_help="List the models and their prices.")
    app.add_typer(pool.nodes_app, name="nodes")
    app.command("deploy", short_help="Have a model served.")(deployments.deploy)
    app.command("undeploy", short_help="No longer have it served.")(deployments.undeploy)
    app.command("deployments", short_help="List the models that should be served.")(deployments.list_deployments)
    app.command("explain", short_help="Say why a model, or a request, is where it is.")(explaining.explain)
    app.command("why-queued", short_help="Say what a request waits for.")(explaining.why_queued)
    app.command("why-not-my-node", short_help="Say why a node gets what it gets.")(explaining.why_not_my_node)
    app.command("tiers", short_help="Show what the service tiers promise, and have left for you.")(tiers.tiers)
    app.command("credits", short_help="Show your credits.")(money.credits_command)
    app.command("audit", short_help="Check that the books balance.")(money.audit)
    app.add_typer(access.tokens_app, name="tokens")
    app.add_typer(access.keys_app, name="keys")
    app.add_typer(access.accounts_app, name="accounts")
    roles = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    names = [wanted] if wanted in roles else sorted(roles) if wanted is None or wanted.startswith("-") else []
    for name in names:
        _add_role(app, roles[name])
    return app


def _add_role(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        app.add_typer(entry.load(), name=entry.name)
    except ModuleNotFoundError as error:
        missing = error.name
        # The extra is called as its package is: potluck_coordinator brings `fit` too.
        extra = entry.module.partition(".")[0].removeprefix("potluck_")

        @app.command(
            entry.name,
            help=f"Not installed: {install_command(extra)}",
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
            add_help_option=False,
        )
        def hint() -> None:
            say(f"error: `potluck {entry.name}` needs {missing}, which is not installed. Run: {install_command(extra)}")
            raise typer.Exit(EXIT_FAILED)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"potluck {package_version()}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    del version
