"""When somebody last typed into a terminal of this machine, by the times that the kernel keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil

UTMP: Final = Path("/var/run/utmp")
DEVICES: Final = Path("/dev")


def idle_seconds(now_unix_seconds: float, utmp: Path = UTMP, devices: Path = DEVICES) -> float | None:
    """Since the newest word into any terminal that somebody is logged in on; infinite where nobody is. None without a list of them.

    The kernel notes it within 8 s. A desktop's screen is in the list as ":0" and is no terminal: `display` tells of it.
    """
    if not utmp.exists():
        return None
    try:
        terminals = {user.terminal for user in psutil.users() if user.terminal}
    except (psutil.Error, OSError):
        return None
    found: list[float] = []
    for terminal in terminals:
        try:
            found.append(max(0.0, now_unix_seconds - (devices / terminal).stat().st_atime))
        except OSError:
            continue
    return min(found, default=float("inf"))
