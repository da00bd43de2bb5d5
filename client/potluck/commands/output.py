"""Standard output of this process, whichever command writes there, and how a command ends whose result it does not take.

Decides that it ends as other tools do: silently, and with what a shell reports of SIGPIPE, where nobody reads any more, as after `| head`;
with one line and as failed where standard output is closed, full or broken. It must not know what is shown.

The signal itself stays ignored: it would end a coordinator or an agent for any connection that breaks.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from potluck.commands.terminal import EXIT_FAILED, say

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

EXIT_NOBODY_READS: Final = 128 + signal.SIGPIPE


def guard_output() -> None:
    """Puts the guard before standard output, if there is none yet. Call it before any command runs."""
    if sys.stderr is None:
        # What is said beside a result may be lost, and those who say it need not know.
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process is
    if sys.stdin is None:
        # Who asks gets no answer, as of an empty file.
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - as above
    stream = sys.stdout
    if stream is not sys.__stdout__ and stream is not None:
        # Somebody else's, who asked for it: a test's, or a guard.
        return
    if isinstance(stream, io.TextIOWrapper):
        raw = io.BufferedWriter(_Output(stream.fileno()))
        sys.stdout = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
    else:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Output(None)), "utf-8")


class _Output(io.RawIOBase):
    """A file that ends the process when it takes no more; from then on it takes everything, so that ending says nothing of it again.

    Args:
        descriptor: None where the process was started without one; the number is another file's by now.
    """

    def __init__(self, descriptor: int | None) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lost = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self._descriptor

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer, /) -> int:
        if self._lost:
            return memoryview(data).nbytes
        if self._descriptor is None:
            self._end("standard output is closed, so nothing can be shown; what was done before stays done.")
        try:
            return os.write(self._descriptor, data)
        except BrokenPipeError:
            self._lost = True
            raise SystemExit(EXIT_NOBODY_READS) from None
        except OSError as error:
            self._end(f"standard output: {error.strerror or error}")

    def _end(self, why: str) -> NoReturn:
        self._lost = True
        # Standard error may be the same full file; whoever goes on without its output must not meet another failure than this one.
        with suppress(OSError):
            say(f"error: {why}")
        raise SystemExit(EXIT_FAILED)
