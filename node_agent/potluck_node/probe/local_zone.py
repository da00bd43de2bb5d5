"""The time zone of the clock on the owner's wall."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

LOCALTIME = Path("/etc/localtime")


def local_zone(environment: Mapping[str, str], localtime: Path = LOCALTIME) -> tzinfo:
    """As the C library finds it: TZ, else the machine's own file, else UTC. Never raises."""
    named = environment.get("TZ", "").removeprefix(":")
    if named:
        try:
            return ZoneInfo(named)
        except (OSError, ValueError, LookupError):  # "CET-1CEST" and the like: the machine's own is nearer to what is meant than UTC
            pass
    try:
        with localtime.open("rb") as rules:
            return ZoneInfo.from_file(rules, key=_name(localtime))
    except (OSError, ValueError):
        return UTC


def _name(localtime: Path) -> str | None:
    """Such as "Europe/Berlin", where the file is a link to the rules of that name."""
    _, found, name = str(localtime.resolve()).rpartition("/zoneinfo/")
    return name if found else None
