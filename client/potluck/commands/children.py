"""Child processes that never outlive their use.

Decides how a `potluck` child is started (a group of its own, output in a file, tied to this process), what becomes of its predecessor's
output, and how it is stopped: asked, waited for within a bound, then killed with everything in its group. It must not know what it does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from potluck.errors import pool_error
from potluck.tether import PARENT_VARIABLE
from potluck_protocol.errors import ErrorCode

TAIL_LINE_COUNT: Final = 15
TAIL_BYTES_MAX: Final = 16 * 1024
PREVIOUS_SUFFIX: Final = ".1"
"""Of the output before this run's. One is kept: what led to a crash is still there after the next start, and old ones do not pile up."""


def potluck_command(*arguments: str) -> list[str]:
    """The command line of a `potluck` that ends with this process."""
    return [sys.executable, "-m", "potluck", *arguments]


def child_environment(base: Mapping[str, str], **changes: str) -> dict[str, str]:
    """The environment for such a child."""
    return {**base, **changes, PARENT_VARIABLE: str(os.getpid())}


class Child:
    """One running child.

    Args:
        log_file: for its output. One that is there already, of an earlier run, gets the suffix `.1`, in the place of the one before it.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path) -> None:
        self.name = name
        self.log_file = log_file
        with suppress(FileNotFoundError):
            log_file.rename(f"{log_file}{PREVIOUS_SUFFIX}")
        with os.fdopen(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as log:
            self._process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises InternalError, with the last lines of its output, if the child has ended."""
        if (status := self._process.poll()) is not None:
            raise pool_error(
                ErrorCode.INTERNAL_ERROR, f"The {self.name} ended by itself (exit {status}). The end of {self.log_file}:\n{self.log_tail()}"
            )

    def stop(self, grace_seconds: float) -> None:
        """Asks the child to stop, waits that long, then kills its group: what it left behind, too. Ends with the child reaped."""
        try:
            self._process.terminate()  # does nothing to one that was seen to have ended
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_seconds)
        finally:
            self._kill()

    def log_tail(self) -> str:
        """The last lines of the child's output."""
        with suppress(OSError):
            with self.log_file.open("rb") as log:
                log.seek(max(0, self.log_file.stat().st_size - TAIL_BYTES_MAX))
                lines = log.read().decode(errors="replace").splitlines()
            return "\n".join(lines[-TAIL_LINE_COUNT:])
        return ""

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
