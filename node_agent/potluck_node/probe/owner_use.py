"""When the owner's hands were last on the machine, by everything that can tell.

Decides that the newest use counts, and what is said where nothing tells. It must not know how long is long enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from potluck_node.domain.rest import Use
from potluck_node.probe import display, logind, terminals

NOBODY_SECONDS: Final = 10.0 * 365 * 86_400
"""Where nobody is logged in: longer than any limit, and a number that JSON has."""


def owner_use(now_unix_seconds: float, environment: Mapping[str, str]) -> Use:
    """By logind, terminals and the X display, as far as they are there. Blocks for some milliseconds; never raises."""
    x_display = display.idle_seconds(environment)
    told = {
        "logind": logind.idle_seconds(now_unix_seconds, without="" if x_display is None else "x11"),
        "terminals": terminals.idle_seconds(now_unix_seconds),
        "the X display": x_display,
    }
    return newest({name: seconds for name, seconds in told.items() if seconds is not None})


def newest(told: Mapping[str, float]) -> Use:
    """The newest use, with who told of it."""
    if not told:
        return Use(None, "neither logind nor a list of terminals nor an X display with xprintidle is there")
    name = min(told, key=lambda name: told[name])
    return Use(NOBODY_SECONDS if math.isinf(told[name]) else told[name], f"by {name}")
