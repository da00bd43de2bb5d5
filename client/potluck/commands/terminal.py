"""How the commands speak: tables, JSON, failures and exit codes.

Decides what reaches standard output (results, for people and for scripts) and what reaches standard error (everything said beside them). It
must not know what is shown, nor what becomes of a result that cannot be: see `output`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from potluck.errors import CoordinatorUnavailableError, CredentialError, error_of_protocol
from potluck_protocol.errors import PotluckError

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_AUTHORISED: Final = 4
EXIT_UNREACHABLE: Final = 5

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_DURATION: Final = re.compile(r"(\d{1,9})([smhd])")
_SECONDS_PER_UNIT: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration_seconds(text: str) -> int:
    """The seconds of a text such as "90s", "30m", "1h" or "7d"."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f'"{text}" is not a duration; write one such as 90s, 30m, 1h or 7d')
    return int(match[1]) * _SECONDS_PER_UNIT[match[2]]


def say(text: str) -> None:
    """A line for the person, beside the result."""
    typer.echo(text, err=True)


def show(text: str) -> None:
    """A line of the result."""
    show_part(text + "\n")


def show_part(text: str) -> None:
    """A part of the result, as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """A frozen value or a list of them, as JSON."""
    # Where letters would be spelled out, JSON has a way of its own.
    all_letters = sys.stdout.encoding.lower().startswith("utf")
    show(json.dumps(value, default=_jsonable, indent=2, ensure_ascii=not all_letters))


def show_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns that are as wide as they need to be, whatever the terminal: scripts cut them apart."""
    lines = [tuple(headers), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        show("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def moment(unix_ms: int) -> str:
    """A time as people read it, in UTC; "never" for 0."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M") if unix_ms else "never"


def install_command(extras: str) -> str:
    """How parts that are missing are installed: from the sources, for no index has Potluck."""
    return f"pip install '.[{extras}]' (in the folder of Potluck's sources)"


def explain(error: PotluckError) -> int:
    """Says what failed; the exit code that stands for it."""
    known = error_of_protocol(error)
    reference = f"  (request {error.request_id})" if error.request_id else ""
    say(f"error: {error.message}{reference}")
    if isinstance(known, CredentialError):
        return EXIT_NOT_AUTHORISED
    return EXIT_UNREACHABLE if isinstance(known, CoordinatorUnavailableError) else EXIT_FAILED


def _jsonable(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
