"""One live line for what is going on now.

Decides how it looks: rewritten in place on a terminal, one line for each change of phase elsewhere. It must not know the phases.
"""

from __future__ import annotations

import sys
import time
from typing import Final, Self

_CLEAR_LINE: Final = "\r\x1b[2K"


class LiveLine:
    """On standard error; a context manager, so that the line is ended whatever happens."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._phase = ""
        self._started_at = time.monotonic()

    def update(self, phase: str, detail: str = "") -> None:
        """Shows the phase; its detail changes too often for anything but a terminal."""
        if self._live:
            elapsed = f"{time.monotonic() - self._started_at:4.0f} s"
            sys.stderr.write(f"{_CLEAR_LINE}{elapsed}  {phase}{f'  {detail}' if detail else ''}")
        elif phase != self._phase:
            sys.stderr.write(f"{phase}\n")
        self._phase = phase
        sys.stderr.flush()

    def end(self) -> None:
        """Leaves the last phase standing."""
        if self._live and self._phase:
            sys.stderr.write("\n")
        self._phase = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.end()


def megabytes(byte_count: int) -> str:
    return f"{byte_count / 1e6:.1f} MB"
