"""When the owner's hands were last on the machine, as systemd's logind keeps it: a desktop tells it, and terminals are watched by it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Final

LIMIT_SECONDS: Final = 5.0
SESSIONS_MAX: Final = 64
_OF_PEOPLE: Final = "user"


def run_loginctl(arguments: Sequence[str]) -> str:
    """What `loginctl` prints; raises OSError, subprocess.SubprocessError."""
    done = subprocess.run(
        ["loginctl", "--no-legend", "--no-pager", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


def idle_seconds(now_unix_seconds: float, *, without: str = "", loginctl: Callable[[Sequence[str]], str] = run_loginctl) -> float | None:
    """Since the newest use of any session of a person; infinite where nobody is logged in. None without a logind to ask. Blocks.

    Args:
        now_unix_seconds: the time.
        without: sessions of this type are left out, such as "x11": some desktops never tell logind that nobody is there.
        loginctl: runs it.
    """
    try:
        names = [line.split()[0] for line in loginctl(["list-sessions"]).splitlines() if line.split()][:SESSIONS_MAX]
        wanted = [f"--property={name}" for name in ("Class", "IdleHint", "IdleSinceHint", "State", "Type")]
        text = loginctl(["show-session", *wanted, *names]) if names else ""
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    sessions = [session for session in _sessions(text) if not without or session.get("Type") != without]
    found = [_idle_seconds(session, now_unix_seconds) for session in sessions]
    return min((seconds for seconds in found if seconds is not None), default=float("inf"))


def _sessions(text: str) -> Iterator[dict[str, str]]:
    """A block of `Name=value` lines for each, with an empty line between them."""
    for block in text.split("\n\n"):
        fields = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if fields:
            yield fields


def _idle_seconds(session: dict[str, str], now_unix_seconds: float) -> float | None:
    if session.get("Class") != _OF_PEOPLE or session.get("State") == "closing":
        return None
    if session.get("IdleHint") != "yes":
        return 0.0
    since_microseconds = session.get("IdleSinceHint", "")
    return max(0.0, now_unix_seconds - int(since_microseconds) / 1e6) if since_microseconds.isdecimal() else 0.0
