"""`potluck node pause`, `finish` and `resume`: the owner's word over the running node.

Decides what is waited for. `pause` and `finish` return when the machine is the owner's again, `resume` when the agent has heard it; a wait
that is cut off leaves the word as it was said. They reach the agent through `control`, as the other commands do. It must not know how a
node comes to rest.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from potluck_node.control import STATUS_STALE_MS, AgentStatus, Control, Stage, read_control, read_status, write_control
from potluck_node.domain.rest import NO_WORD, Posture, Word, reasons_of_word
from potluck_node.identity_store import StateFolder
from potluck_node.node_meant import folder_of_node_meant
from potluck_node.rest_words import date_words, is_said_by_owner, reason_words, stage_words
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError

HEARD_SECONDS_MAX: Final = 30.0
"""For the agent to read what was said: it looks every second, and takes some to start."""
FREE_SECONDS_MAX: Final = 60.0
"""Beyond the time that answers are given: for engines to be stopped, which is bounded below this."""
LOOK_SECONDS: Final = 0.1
PAUSE_DAYS_MAX: Final = 365
EXIT_INTERRUPTED: Final = 130
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

ForSoLong = Annotated[str | None, typer.Option("--for", help="Come back by itself after so long: 90s, 30m, 2h, 1d.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Where the node's key and settings lie.", show_default=False)]


def pause(for_: ForSoLong = None, as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """Give the machine back now: answers under way go on on other nodes. Returns when its memory is free; Ctrl-C only stops the waiting.

    The node stays paused, also over a restart, until `potluck node resume`, or for as long as `--for` says.
    """
    until_unix_ms = None if for_ is None else SystemClock().unix_ms() + round(parse_duration(for_) * 1000)
    _rest(state_dir, Word(Posture.HAND_OVER, until_unix_ms), "pause", as_json=as_json)


def finish(as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """As `pause`, but answers under way are finished here first, within `drain_seconds`; what then still runs goes on on other nodes."""
    _rest(state_dir, Word(Posture.FINISH), "finish", as_json=as_json)


def resume(as_json: AsJson = False, state_dir: StateDir = None) -> None:
    """Share this machine: after `pause` or `finish`, and once after joining."""
    folder = folder_of_node_meant(state_dir)
    control = _say(folder, NO_WORD)
    status = _heard(folder, control) if folder.locked else None
    reasons = [reason_words(reason) for reason in status.rest.rest.reasons if not is_said_by_owner(reason)] if status else []
    if as_json:
        facts = {"word": "resume", "state_dir": str(folder.path), "running": status is not None, "resting_because": reasons}
        typer.echo(json.dumps(facts, indent=1))
    elif status is None:
        typer.echo("No agent is running; the node serves when it is started: potluck node run")
    elif reasons:
        typer.echo("\n".join(["The node heard it, and rests all the same:", *(f"  it {reason}" for reason in reasons)]))
    else:
        typer.echo("The node serves again; `potluck node status` shows its engines coming back.")


def parse_duration(words: str) -> float:
    """Seconds; raises typer.BadParameter for what is no duration, or one of more than a year."""
    parts = re.findall(r"(\d{1,9})([smhd])", words.strip().lower())
    seconds = sum(int(count) * _SECONDS[unit] for count, unit in parts)
    if "".join(count + unit for count, unit in parts) != words.strip().lower() or not 0 < seconds <= PAUSE_DAYS_MAX * _SECONDS["d"]:
        raise typer.BadParameter(f"{words!r} is no time to pause for: write 90s, 30m, 2h or 1d, up to {PAUSE_DAYS_MAX}d.")
    return float(seconds)


def _say(folder: StateFolder, word: Word) -> Control:
    if not folder.locked:
        folder.identity()  # raises what there is to do; of a node that runs nothing keeps its owner from their machine
    return write_control(folder.path, word=word, said_at_unix_ms=SystemClock().unix_ms())


def _rest(state_dir: Path | None, word: Word, name: str, *, as_json: bool) -> None:
    folder = folder_of_node_meant(state_dir)
    control = _say(folder, word)
    began_at = time.monotonic()
    try:
        running = folder.locked and _until_free(folder, control)
    except KeyboardInterrupt:
        typer.echo(f"What you said stands: the node goes on to {name}. `potluck node status` shows how far it is.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    facts: dict[str, Any] = {
        "word": name,
        "until_unix_ms": word.until_unix_ms,
        "state_dir": str(folder.path),
        "running": running,
        "memory_free": True,
        "seconds": round(time.monotonic() - began_at, 2) if running else 0.0,
    }
    typer.echo(json.dumps(facts, indent=1) if as_json else _done_words(word, running=running))


def _done_words(word: Word, *, running: bool) -> str:
    back = "`potluck node resume` shares this machine again."
    if word.until_unix_ms is not None:
        back = f"It serves again from {date_words(word.until_unix_ms)} on, or after `potluck node resume`."
    return f"{'Paused, memory free.' if running else 'No agent is running, so it holds no memory; it starts paused.'} {back}"


def _until_free(folder: StateFolder, control: Control) -> bool:
    """Shows how the node comes to rest, until it is there; False where no agent is running any more: it took its engines with it."""
    began_at, limit_seconds = time.monotonic(), FREE_SECONDS_MAX
    console, told = Console(stderr=True), ""
    with console.status("waiting for the agent") as live:
        while folder.locked:
            if not reasons_of_word(read_control(folder.path).word, SystemClock().unix_ms()):
                raise PotluckError(ErrorCode.INVALID_REQUEST, "It was taken back before the node was at rest: it serves again.")
            status = _newest(folder, control)
            if status is not None and status.rest.stage is Stage.FREE:
                return True
            words = "waiting for the agent" if status is None else stage_words(status)
            if status is not None:
                limit_seconds = status.drain_seconds + FREE_SECONDS_MAX
            if words != told:
                live.update(words)
                if not console.is_terminal:
                    console.print(words, markup=False, highlight=False, soft_wrap=True)
                told = words
            if time.monotonic() - began_at > limit_seconds:
                text = f"The node is not at rest after {limit_seconds:.0f} s ({words}). What you said stands; see `potluck node status`."
                raise PotluckError(ErrorCode.INTERNAL_ERROR, text)
            time.sleep(LOOK_SECONDS)
    return False


def _heard(folder: StateFolder, control: Control) -> AgentStatus | None:
    """The first status after the agent heard it; None where it ended meanwhile."""
    deadline = time.monotonic() + HEARD_SECONDS_MAX
    while folder.locked:
        status = _newest(folder, control)
        if status is not None:
            return status
        if time.monotonic() > deadline:
            text = f"The agent has not heard it within {HEARD_SECONDS_MAX:.0f} s. What you said stands; see `potluck node status`."
            raise PotluckError(ErrorCode.INTERNAL_ERROR, text)
        time.sleep(LOOK_SECONDS)
    return None


def _newest(folder: StateFolder, control: Control) -> AgentStatus | None:
    """The agent's status, once it has heard what was said. An agent that hangs raises PotluckError."""
    status = read_status(folder.path)
    if status is None:
        return None
    if SystemClock().unix_ms() - status.updated_at_unix_ms > STATUS_STALE_MS and _is_running_as(folder, status):
        text = f"The agent (process {status.pid}) does not respond. What you said stands; stop that process to have the machine back now."
        raise PotluckError(ErrorCode.INTERNAL_ERROR, text)
    return status if status.rest.heard_unix_ms >= control.said_at_unix_ms else None


def _is_running_as(folder: StateFolder, status: AgentStatus) -> bool:
    """Not where the status is what an agent that was killed left behind, and another is just starting."""
    return folder.locked and Path(f"/proc/{status.pid}").exists()
