"""How the owner's commands and the running agent talk: two small files in the state folder, and no socket.

Decides the form of `control.json`, which the commands write and the agent polls (and clears of a `leave` that was not carried out), and of
`status.json`, which the agent writes and the commands read. It must not know what pausing or leaving does.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

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

    paused: bool = False
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
class AgentStatus:
    """The running agent as its owner sees it."""

    pid: int
    node_id: str
    phase: str
    """ "connecting", "serving" or "fenced"."""
    state: str
    """ "serving", "paused" or "draining"."""
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
    engine_lines_are_kept: bool = False
    """Whether the owner wants the last lines of engines that fail: a setting of the agent's, which the command's own shell may not have."""


_STATUS_FORM: Final = TypeAdapter(AgentStatus)


def read_control(folder: Path) -> Control:
    """What the owner wants; the default where nothing was asked, or the file is damaged."""
    fields = _read(folder / _CONTROL)
    return Control(paused=fields.get("paused") is True, leaving=fields.get("leaving") is True)


def write_control(folder: Path, *, paused: bool | None = None, leaving: bool | None = None) -> Control:
    """Changes what is named and keeps the rest. Where nothing changes nothing is written: a full disk keeps no agent from its start."""
    control = before = read_control(folder)
    if paused is not None:
        control = replace(control, paused=paused)
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


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path)
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
