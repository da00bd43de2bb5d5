"""`potluck node`: what a volunteer types.

Decides flags, words and exit codes: 0 done, 1 failed, 2 used wrongly, 4 not authorised, 5 nobody answered. `join` reads the invite
(`potluck_protocol.connection`), takes stock (`probe.inventory`), calls `enrolment` and ends; `run` hands over to `agent`; the others reach
a running agent through `control`; without one, `leave` goes through `agent` too. Only this module touches `os.environ`, and hands it on;
settings from `POTLUCK_NODE_*` are read in `settings`. It must not know how a node works.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from potluck_node import enrolment
from potluck_node.control import STATUS_STALE_MS, AgentStatus, EngineLine, read_control, read_status, write_control
from potluck_node.doctor_command import doctor
from potluck_node.domain.card_limit import capped
from potluck_node.domain.model_source import ATTACHED_KIND
from potluck_node.domain.rest import FIRST_WORD, NO_WORD, Word, reasons_of_word
from potluck_node.engines import last_lines
from potluck_node.engines_command import engines_app, missing_engine_hint
from potluck_node.heat_words import heat_lines
from potluck_node.identity_store import StateFolder
from potluck_node.node_meant import folder_of_node_meant, settings_of_node_named
from potluck_node.probe.inventory import take_inventory
from potluck_node.progress import ProgressLine, attached_words, engine_words, link_words
from potluck_node.rest_command import finish, pause, resume
from potluck_node.rest_words import reason_words, stage_words
from potluck_node.settings import load_settings
from potluck_protocol.circles import look_rarely
from potluck_protocol.clock import SystemClock
from potluck_protocol.connection import Invite
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.observe import configure_logging
from potluck_protocol.values import FailureKind, GoodbyeReason

if TYPE_CHECKING:
    from potluck_node.agent_life import Agent

NOT_AUTHORISED: Final = frozenset(
    {ErrorCode.INVALID_INVITE, ErrorCode.INVALID_CERTIFICATE, ErrorCode.INVALID_API_KEY, ErrorCode.PERMISSION_DENIED}
)
FAILED_SERVING: Final = ("the engine ended", "the engine hung")
"""How failures of engines begin that had served, whose own lines nobody is told."""
_LINES_HINT: Final = (
    "its own last lines may quote prompts, and are kept only if you say so: POTLUCK_NODE_KEEP_ENGINE_LINES=true for `potluck node run`"
)
LEAVE_MARGIN_SECONDS: Final = 30.0
"""Beyond the time to drain, how long `leave` waits for the running agent."""
_HELP: Final = """Give this machine's spare time to a pool.

1. Ask the pool's operator for an invite.
2. `potluck node join` and paste it. Nothing is opened on your router: the node only dials out.
3. `potluck node run`, and leave it running. It serves nothing before you say so: `potluck node resume`.

`potluck node pause` gives you the machine back within seconds, `finish` after the answers under way, and `resume` shares it again.

Your limits win over the pool's wishes. Set them in node.toml or as POTLUCK_NODE_* variables, some as flags of `run`.
"""

app = typer.Typer(name="node", help=_HELP, no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Where the node's key and settings lie.", show_default=False)]
ModelsAllowed = Annotated[
    str | None, typer.Option(help="Model ids that may run here, with commas between; any if not given.", show_default=False)
]
SlotCountMax = Annotated[int | None, typer.Option(help="Answers at the same time, at most, for each engine.", show_default=False)]
MemoryBudget = Annotated[
    int | None, typer.Option(help="How much of this machine's memory engines without cards may take.", show_default=False)
]
TemperatureMax = Annotated[
    int | None, typer.Option(help="How hot a card may get, 40 to 95 °C, before it gets less to do.", show_default=False)
]
PowerLimit = Annotated[int | None, typer.Option(help="How much power a card with an engine may take: 50 to 1000 W.", show_default=False)]
GroupSite = Annotated[
    str | None, typer.Option(help="Let this machine serve models together with others of the place of this name.", show_default=False)
]
GroupAddress = Annotated[
    str | None, typer.Option(help="The private address, or its interface, where they reach each other.", show_default=False)
]
GroupTrusts = Annotated[
    str | None, typer.Option(help="Accounts of other owners to share models with, with commas between.", show_default=False)
]
Attach = Annotated[
    list[str] | None,
    typer.Option(
        help='A server that runs here already: http://127.0.0.1:11434, or "URL FILE" with its key in the file.', show_default=False
    ),
]


@app.command()
def join(
    invite: Annotated[str | None, typer.Argument(help="The invite; - reads it from standard input.", show_default=False)] = None,
    invite_file: Annotated[Path | None, typer.Option(help="A file that holds the invite.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option(help="What the pool calls this node; its host name if not given.", show_default=False)] = None,
    as_json: AsJson = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve from the first run on, without `potluck node resume`.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Make this machine a node of a pool, once.

    Its key is made here and never leaves. The coordinator must prove that it is the one the invite names before it sees the secret. The
    node's first run begins paused, so that you can look at it first.
    """
    with _explained():
        configure_logging(json=False, level="warning")
        settings = load_settings(state_dir=state_dir)
        folder = StateFolder(settings.state_dir)
        display_name = name or socket.gethostname()
        parsed = Invite.parse(_invite_text(invite, invite_file))
        inventory = capped(take_inventory(settings.cache_dir), settings.card_memory_bytes_max)
        identity = asyncio.run(
            enrolment.join(
                parsed,
                folder,
                display_name=display_name,
                inventory=inventory,
                first_word=NO_WORD if serve else FIRST_WORD,
                clock=SystemClock(),
            )
        )
    if as_json:
        facts = {"node_id": identity.node_id, "display_name": display_name, "owner_account_id": identity.owner_account_id}
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(f"This machine is now node {identity.node_id} ({display_name}). It earns for account {identity.owner_account_id}.")
    if hint := missing_engine_hint(settings, has_cards=bool(inventory.accelerators)):
        typer.echo(hint, err=as_json)
    typer.echo("Next: potluck node run" + ("" if serve else ", and when you want it to serve: potluck node resume"), err=as_json)


@app.command()
def run(
    state_dir: StateDir = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where model files are kept.", show_default=False)] = None,
    disk_budget_bytes: Annotated[int | None, typer.Option(help="How much model files may take together.", show_default=False)] = None,
    models_allowed: ModelsAllowed = None,
    slot_count_max: SlotCountMax = None,
    memory_budget_bytes: MemoryBudget = None,
    temperature_celsius_max: TemperatureMax = None,
    power_limit_watts: PowerLimit = None,
    group_site: GroupSite = None,
    group_address: GroupAddress = None,
    group_port: Annotated[int | None, typer.Option(help="And the port there; 29600 and the one above.", show_default=False)] = None,
    group_trusts: GroupTrusts = None,
    attach: Attach = None,
    drain_seconds: Annotated[float | None, typer.Option(help="How long answers may go on after Ctrl-C.", show_default=False)] = None,
    url: Annotated[str | None, typer.Option(help="Where the coordinator answers now, if it has moved.", show_default=False)] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json.", show_default=False)] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default=False)] = None,
) -> None:
    """Serve until Ctrl-C. Answers under way are finished first; a second Ctrl-C stops at once."""
    import uvloop  # noqa: PLC0415 - with the agent, most of a second that `--help` need not wait for

    from potluck_node.agent import run_agent  # noqa: PLC0415

    console = Console()
    with _explained(), ProgressLine(console) as line:
        if log_level is None and "POTLUCK_NODE_LOG_LEVEL" not in os.environ and console.is_terminal:
            # On a terminal the progress line tells how things go; log lines beside it are for what goes wrong.
            log_level = "warning"
        settings = load_settings(
            state_dir=state_dir,
            cache_dir=cache_dir,
            disk_budget_bytes=disk_budget_bytes,
            models_allowed=models_allowed,
            slot_count_max=slot_count_max,
            memory_budget_bytes=memory_budget_bytes,
            temperature_celsius_max=temperature_celsius_max,
            power_limit_watts=power_limit_watts,
            group_site=group_site,
            group_address=group_address,
            group_port=group_port,
            group_trusts=group_trusts,
            attach_urls=tuple(attach) if attach else None,
            drain_seconds=drain_seconds,
            url=url,
            log_format=log_format,
            log_level=log_level,
        )
        configure_logging(json=settings.log_format == "json", level=settings.log_level)
        look_rarely()
        uvloop.run(run_agent(settings, environment=os.environ, show=line.show, started=_stop_on_signals))


@app.command()
def status(
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Show this node, its link and its engines, with an engine's last words when it failed."""
    with _explained():
        folder = folder_of_node_meant(state_dir)
        identity = folder.identity()
        running = folder.locked
        current = read_status(folder.path) if running else None
        word = read_control(folder.path).word
    facts: dict[str, Any] = {
        "node_id": identity.node_id,
        "display_name": identity.display_name,
        "owner_account_id": identity.owner_account_id,
        "coordinator": identity.connection.link_target,
        "state_dir": str(folder.path),
        "running": running,
        "word": asdict(word),
        "status": asdict(current) if current else None,
        "engine_lines": [str(path) for path in last_lines.kept(folder.path)],
    }
    typer.echo(json.dumps(facts, indent=1) if as_json else _status_words(facts, word, current))


@app.command()
def leave(
    state_dir: StateDir = None,
    force: Annotated[bool, typer.Option(help="Remove the key from this machine even if the coordinator cannot be told.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take this machine out of the pool for good: the coordinator is told, the key is removed. Model files stay in the cache."""
    from potluck_node.agent import leave_without_agent  # noqa: PLC0415 - as in `run`

    with _explained():
        # Each dial in vain would be a line, and then come the words that say it all.
        configure_logging(json=False, level="error")
        settings = settings_of_node_named(state_dir)
        folder = StateFolder(settings.state_dir)
        identity = folder.identity()
        try:
            if folder.locked:
                _leave_through_agent(folder, settings.drain_seconds + LEAVE_MARGIN_SECONDS)
            else:
                asyncio.run(leave_without_agent(settings))
        except PotluckError as error:
            # A node that the pool does not know any more has left already.
            if error.code is not ErrorCode.INVALID_CERTIFICATE and not force:
                raise
            folder.remove()
    words = f"Node {identity.node_id} has left. Its key is removed from this machine."
    typer.echo(json.dumps({"node_id": identity.node_id}, indent=1) if as_json else words)


@contextmanager
def _explained() -> Iterator[None]:
    """A failure in one line that names cause and fix, and its exit code."""
    try:
        yield
    except PotluckError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(_exit_code(error.code)) from None


def _exit_code(code: ErrorCode) -> int:
    if code in NOT_AUTHORISED:
        return 4
    return 5 if code is ErrorCode.COORDINATOR_UNAVAILABLE else 1


def _invite_text(invite: str | None, invite_file: Path | None) -> str:
    if invite_file is not None:
        if invite is not None:
            raise typer.BadParameter("give the invite itself or --invite-file, not both")
        try:
            return invite_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"The invite file {invite_file} cannot be read: {error}") from None
    if invite is None and sys.stdin.isatty():
        return str(typer.prompt("Invite", hide_input=True))
    return sys.stdin.read() if invite in {None, "-"} else str(invite)


def _stop_on_signals(agent: Agent) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, agent.stop, GoodbyeReason.STOPPING)


def _leave_through_agent(folder: StateFolder, limit_seconds: float) -> None:
    write_control(folder.path, leaving=True)
    deadline = time.monotonic() + limit_seconds
    while folder.locked:
        if time.monotonic() > deadline:
            text = f"The running agent has not ended within {limit_seconds:.0f} s; see its output, stop it, and try again."
            raise PotluckError(ErrorCode.INTERNAL_ERROR, text)
        time.sleep(0.2)
    if folder.joined:
        text = "The running agent could not tell the coordinator; its output says why. Try again, or use --force."
        raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, text)


def _status_words(facts: dict[str, Any], word: Word, current: AgentStatus | None) -> str:
    lines = [
        f"node         {facts['node_id']} ({facts['display_name']})",
        f"earns for    {facts['owner_account_id']}",
        f"coordinator  {facts['coordinator']}",
    ]
    if current is None:
        lines.append("agent        not running; start it with `potluck node run`" if not facts["running"] else "agent        starting")
    else:
        stale = time.time_ns() // 1_000_000 - current.updated_at_unix_ms > STATUS_STALE_MS
        lines.append(f"agent        pid {current.pid}" + (", not responding" if stale else ""))
        lines.append(f"link         {link_words(current).split(': ', 1)[1]}")
        lines += [f"attached     {attached_words(line)}" for line in current.attached]
        lines += heat_lines(current)
    lines += _rest_lines(word, current)
    for engine in current.engines if current else ():
        lines += _engine_lines(engine)
        if current and not current.engine_lines_are_kept and _left_lines(engine):
            lines.append(f"             | {_LINES_HINT}")
    lines += [f"last lines   {path}; they may quote prompts and answers" for path in facts["engine_lines"]]
    return "\n".join(lines)


def _rest_lines(word: Word, current: AgentStatus | None) -> list[str]:
    """Every reason why the node rests; without an agent, what the owner said to the next one."""
    if current is None:
        reasons, stage = reasons_of_word(word, SystemClock().unix_ms()), "starts paused"
    else:
        reasons, stage = current.rest.rest.reasons, stage_words(current)
    return [f"rest         {stage}", *(f"             | it {reason_words(reason)}" for reason in reasons)] if reasons else []


def _engine_lines(engine: EngineLine) -> list[str]:
    """What it is at, and, as far as this leaves it unsaid, why it failed before."""
    words, why = engine_words(engine, fetch_step_percent=1), engine.failure.strip().splitlines()
    said = len(why) == 1 and words.endswith(why[0])
    return [f"engine       {words}", *(f"             | {line}" for line in why if not said)]


def _left_lines(engine: EngineLine) -> bool:
    """Whether it ended of itself after it had served, and so may have said more than is told: an attached server's lines are not ours."""
    ended = engine.failure.startswith(FAILED_SERVING)
    return ended and engine.engine_kind != ATTACHED_KIND and engine.failure_kind != FailureKind.KILLED


for command in (doctor, pause, finish, resume):
    app.command()(_explained()(command))
app.add_typer(engines_app, name="engines")
