"""How the owner's commands and the running agent talk: two small files in the state folder, and no socket.

Decides the form of `control.json`, which the commands write and the agent polls (and clears of a `leave` that was not carried out), and of
`status.json`, which the agent writes and the commands read. What the owner said last stands in the one until it is said otherwise, with the
date until which it counts, so that it outlives the agent. It must not know what pausing or leaving does.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from potluck_node.domain.rest import NO_WORD, SERVING, UNREADABLE_WORD, Rest, Word
from potluck_protocol.private_files import read_json, write_private

POLL_SECONDS: Final = 1.0
"""How often the agent reads the one file and writes the other."""
STATUS_STALE_MS: Final = 10_000
"""A status older than this says that the agent hangs."""
_CONTROL: Final = "control.json"
_STATUS: Final = "status.json"


@dataclass(frozen=True, slots=True)
class Control:
    """What the owner wants of the agent."""

    word: Word = NO_WORD
    said_at_unix_ms: int = 0
    """When; a status that names it was written by an agent that has heard it."""
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class EngineLine:
    """One replica as its owner sees it."""

    replica_id: str
    model_id: str
    state: str
    engine_kind: str
    slot_count: int
    running_count: int
    fetched_bytes: int
    fetch_total_bytes: int
    failure: str
    failure_kind: str = ""


@dataclass(frozen=True, slots=True)
class AttachedLine:
    """One server that the owner attached, as the agent last found it."""

    place: str
    """Host and port."""
    kind: str
    """Which software it is; empty while it was never heard."""
    model_names: tuple[str, ...]
    trouble: str
    """Why it lists no models, or none just now; empty where it does."""


@dataclass(frozen=True, slots=True)
class CardLine:
    """One card's heat as its owner sees it."""

    uuid: str
    temperature_celsius: int | None
    limit_celsius: int
    """What it is kept below: the owner's degrees, or the card's own."""
    power_limit_milliwatts: int | None
    """The one in force."""
    capped: bool
    """By the agent."""
    rung: int
    """As `CardTelemetry.thermal_rung`."""
    throttle_seconds: float
    """Slowed down by heat, since the agent started."""
    lost: bool = False


class Stage(StrEnum):
    """How far the node is on its way from serving to rest."""

    SERVING = "serving"
    FINISHING = "finishing"
    """No new attempts; those under way go on."""
    FREEING = "freeing"
    """What was under way is handed back; engines are being stopped."""
    FREE = "free"
    """No engine lives, and what they held of cards and memory is the owner's again."""


@dataclass(frozen=True, slots=True)
class RestLine:
    """Why the node rests, and how far it is."""

    stage: Stage = Stage.SERVING
    rest: Rest = SERVING
    heard_unix_ms: int = 0
    """`Control.said_at_unix_ms` of the newest word that the agent acts upon."""
    living_count: int = 0
    """Processes of engines that still live, or still hold a card, while FREEING takes longer than it should."""


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """The running agent as its owner sees it."""

    pid: int
    node_id: str
    phase: str
    """ "connecting", "serving" or "fenced"."""
    state: str
    """ "serving", "draining" on the way to rest or away, or "paused"."""
    epoch: int
    lease_left_seconds: float
    attempt_count: int
    progress_count: int
    certificate_valid_until_unix_ms: int
    updated_at_unix_ms: int
    trouble: str
    """Why the link is down; empty while it is up."""
    engines: tuple[EngineLine, ...]
    card_uuids: tuple[str, ...] = ()
    """The cards that these engines were given."""
    serving_card_uuids: tuple[str, ...] = ()
    """Those of them whose engine is ready: it holds memory there."""
    attached: tuple[AttachedLine, ...] = ()
    rest: RestLine = RestLine()
    cards: tuple[CardLine, ...] = ()
    cap_refusal: str = ""
    """Why the agent could not cap a card's power when that was called for; empty where it could, or nothing was."""
    drain_seconds: float = 10.0
    """What FINISH gives answers under way: the agent's own setting, as the next."""
    engine_lines_are_kept: bool = False
    """Whether the owner wants the last lines of engines that fail: a setting of the agent's, which the command's own shell may not have."""


_STATUS_FORM: Final = TypeAdapter(AgentStatus)
_WORD_FORM: Final = TypeAdapter(Word)


def read_control(folder: Path) -> Control:
    """What the owner wants: the default where nothing was ever said, and rest where what was said cannot be read."""
    try:
        fields = read_json(folder / _CONTROL)
    except FileNotFoundError:
        return Control()
    except (OSError, ValueError):
        fields = None
    if not isinstance(fields, dict):
        return Control(UNREADABLE_WORD)
    try:
        word = _WORD_FORM.validate_json(json.dumps(fields.get("word")), strict=True)
    except (ValueError, RecursionError):
        word = UNREADABLE_WORD
    said_at_unix_ms = fields.get("said_at_unix_ms")
    return Control(word, said_at_unix_ms if isinstance(said_at_unix_ms, int) else 0, fields.get("leaving") is True)


def write_control(folder: Path, *, word: Word | None = None, said_at_unix_ms: int = 0, leaving: bool | None = None) -> Control:
    """Changes what is named and keeps the rest. Where nothing changes nothing is written: a full disk keeps no agent from its start.

    Args:
        folder: the state folder.
        word: what the owner says now.
        said_at_unix_ms: when, with `word`.
        leaving: whether the node is to leave for good.
    """
    control = before = read_control(folder)
    if word is not None:
        # Two words within one millisecond, or a clock that was set back: the later one still looks new.
        control = replace(control, word=word, said_at_unix_ms=max(said_at_unix_ms, control.said_at_unix_ms + 1))
    if leaving is not None:
        control = replace(control, leaving=leaving)
    if control != before:
        write_private(folder / _CONTROL, json.dumps(asdict(control)).encode())
    return control


def write_status(folder: Path, status: AgentStatus) -> None:
    """Replaces the status in one step; raises OSError, as on a full disk."""
    # Written every second, and meaningless after a crash.
    write_private(folder / _STATUS, json.dumps(asdict(status)).encode(), durable=False)


def read_status(folder: Path) -> AgentStatus | None:
    """The last status that an agent wrote; None where there is none that can be read."""
    try:
        return _STATUS_FORM.validate_json((folder / _STATUS).read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


def remove_status(folder: Path) -> None:
    """The agent stopped in order. A file that cannot be removed does no harm: without a running agent nobody reads it."""
    with contextlib.suppress(OSError):
        (folder / _STATUS).unlink()
