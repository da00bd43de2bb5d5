"""The protocol version that peers compare, and the package version that they show.

Decides the protocol's number. How far apart two peers may be is judged where they meet.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Final

PROTOCOL_VERSION: Final = 1
"""Grows only when an old peer could no longer be understood; a coordinator serves this version and the one before it."""


@cache  # reading the metadata takes a millisecond, and statuses name the version in every heartbeat
def package_version() -> str:
    """The installed version of Potluck, such as "0.1.0"."""
    return version("potluck")
