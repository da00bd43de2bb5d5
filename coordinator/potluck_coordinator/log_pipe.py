"""An actor's log lines on their way to the driver's pipe: several with one write.

Decides how long a line waits for company, and that nobody ever waits for the pipe: a terminal that is held, or a driver that is busy, costs
lines and not the pool's time. A write for each line was a tenth of what a request cost, here and at the driver, which is woken by each. It
must not know what the lines say.
"""

from __future__ import annotations

import io
import os
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

COMPANY_SECONDS: Final = 0.02
"""Of a process that is killed, so much of its last words is lost. One that ends by itself says them all."""
WRITE_BYTES_MAX: Final = select.PIPE_BUF
"""The kernel writes no more in one piece, and others write into the same pipe."""


class LogPipe(io.TextIOBase):
    """What stands for standard error; never fails whoever writes, from whichever thread.

    Args:
        descriptor: the pipe's, which does not block.
        loop: keeps the time.
    """

    def __init__(self, descriptor: int, loop: asyncio.AbstractEventLoop) -> None:
        self._descriptor = descriptor
        self._loop = loop
        self._lock = threading.RLock()
        self._text = bytearray()
        self._is_due = False
        """Somebody will let out what waits."""

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The pipe's descriptor."""
        return self._descriptor

    def write(self, text: str) -> int:
        """Takes a line, or a part of one."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if len(self._text) + len(data) > WRITE_BYTES_MAX:
                self._write_lines()
            self._text += data
            was_due, self._is_due = self._is_due, True
        if not was_due:
            try:
                self._loop.call_soon_threadsafe(self._loop.call_later, COMPANY_SECONDS, self.let_out)
            except RuntimeError:
                self.let_out()  # the loop is closed: these are the process's last words
        return len(text)

    def flush(self) -> None:
        """Nothing: whoever logs does so after each line."""

    def let_out(self) -> None:
        """Writes the lines that wait; what the pipe does not take now is lost."""
        with self._lock:
            self._is_due = False
            self._write_lines()

    def _write_lines(self) -> None:
        """Lines are lost whole, or not at all: one that is not complete stays."""
        end = self._text.rfind(b"\n") + 1
        lines = bytes(self._text[:end])
        del self._text[:end]
        if lines:
            with suppress(OSError):
                os.write(self._descriptor, lines)
