"""When the mouse or keyboard of an X display was last used, where the agent runs in a session that has one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from typing import Final

LIMIT_SECONDS: Final = 5.0
_PASSED: Final = ("DISPLAY", "XAUTHORITY", "HOME", "PATH")


def run_xprintidle(environment: Mapping[str, str]) -> str:
    """Milliseconds, as the small program of that name prints them; raises OSError, subprocess.SubprocessError.

    A process of its own: Xlib ends the process that calls it when the display goes away.
    """
    passed = {name: environment[name] for name in _PASSED if name in environment}
    done = subprocess.run(
        ["xprintidle"], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True, env=passed, stdin=subprocess.DEVNULL
    )
    return done.stdout


def idle_seconds(environment: Mapping[str, str], xprintidle: Callable[[Mapping[str, str]], str] = run_xprintidle) -> float | None:
    """None without an X display, or without xprintidle. Blocks."""
    if not environment.get("DISPLAY"):
        return None
    try:
        return int(xprintidle(environment).strip()) / 1000
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
