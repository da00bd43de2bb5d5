"""One child process of the agent: started, heard, and gone for certain.

Decides how a child is spawned and how it is stopped: in a process group of its own, with a stdin that ends when this process dies, stderr
kept in a bounded ring, terminated and then killed within a bound. Its arguments ask for `lifeline` to end with it. It must not know
what it is for.

Children come from `subprocess.Popen`, which goes by vfork and exec here and so runs no fork handlers. uvloop's own spawning forks, and then
gRPC's handlers, run while its threads are at work, now and then abort the child before it has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, Final

STDERR_LINES_MAX: Final = 200
"""An engine of several processes says why one of them failed, and then a traceback for each of the others."""
STDERR_LINE_BYTES_MAX: Final = 300
STOP_LIMIT_SECONDS: Final = 5.0
"""After it, a child that was asked to end is killed."""
GROUP_LIMIT_SECONDS: Final = 2.0
"""For the rest of a killed group to be gone, where whoever reaps orphans does so."""
GROUP_LOOK_SECONDS: Final = 0.02
_READ_BYTES: Final = 8192
OUTPUT_LINE_BYTES_MAX: Final = 64 * 1024


class StderrTail:
    """The last lines that a child wrote to stderr."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=STDERR_LINES_MAX)
        self._open_line = b""

    def add(self, piece: bytes) -> None:
        """Takes the next bytes, cut anywhere."""
        *lines, rest = (self._open_line + piece).split(b"\n")
        self._lines.extend(line[:STDERR_LINE_BYTES_MAX] for line in lines if line.strip())
        # A progress bar or a dump without line ends does not grow the buffer.
        self._open_line = rest[:STDERR_LINE_BYTES_MAX]

    def text(self, line_count: int = STDERR_LINES_MAX) -> str:
        """The last lines, joined."""
        lines = [*self._lines, self._open_line] if self._open_line.strip() else list(self._lines)
        return "\n".join(line.decode(errors="replace").rstrip() for line in lines[-line_count:])


class ChildProcess:
    """A running child. `spawn` makes one; `stop` or the child's own end finishes it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._stdout, self._stderr = asyncio.StreamReader(OUTPUT_LINE_BYTES_MAX), asyncio.StreamReader(OUTPUT_LINE_BYTES_MAX)
        self.stderr = StderrTail()
        self._listening = asyncio.create_task(self._listen())
        self._ending = _ending_of(process)

    @classmethod
    def spawn(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> ChildProcess:
        """Starts `python ARGUMENT…` with the interpreter of this process; raises OSError when the machine will not.

        Takes a millisecond or two, until the child runs its program, and awaits nothing: who is cancelled either has no child yet, or
        has it in hand to stop it.
        """
        process = subprocess.Popen(
            # -P: modules come from the installation, never from the folder the agent was started in.
            [sys.executable, "-P", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """The child's process id, which is also its group's."""
        return self._process.pid

    async def first_line(self) -> bytes:
        """The first line on stdout, or b"" when the child ended without one."""
        try:
            return await self._stdout.readline()
        except ValueError:  # longer than OUTPUT_LINE_BYTES_MAX
            return b""

    async def wait(self) -> str:
        """Waits for the end; "" after success, else what ended it: "exit status 1" or "signal SIGKILL"."""
        status = await asyncio.shield(self._ending)
        # A grandchild may hold stderr open for ever.
        await asyncio.wait({self._listening}, timeout=1.0)
        if status == 0:
            return ""
        return f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"

    async def drain_stdout(self) -> None:
        """Reads and drops what the child goes on to print, so that it never blocks on a full pipe."""
        while await self._stdout.read(_READ_BYTES):
            pass

    async def stop(self) -> None:
        """Ends the child and its whole group; returns when it is gone, at the latest after twice STOP_LIMIT_SECONDS and a little."""
        self._signal_group(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._ending), STOP_LIMIT_SECONDS)
        await self.kill()

    async def kill(self) -> None:
        """As `stop`, without asking first: for a child that does not hear, or was stopped (SIGSTOP), where only SIGKILL reaches it."""
        # Where the leader is gone already, what it started is not asked either.
        self._signal_group(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._ending), STOP_LIMIT_SECONDS)
        await self._until_group_gone()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._listening.cancel()
        await asyncio.wait({self._listening}, timeout=1.0)

    async def _until_group_gone(self) -> None:
        """What a leader started may outlive it by the time that its memory takes to be freed, and the next child would find that taken."""
        for _ in range(int(GROUP_LIMIT_SECONDS / GROUP_LOOK_SECONDS)):
            try:
                os.killpg(self._process.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            await asyncio.sleep(GROUP_LOOK_SECONDS)

    def _signal_group(self, order: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, order)

    async def _listen(self) -> None:
        await _read_into(self._stdout, self._process.stdout)
        await _read_into(self._stderr, self._process.stderr)
        while piece := await self._stderr.read(_READ_BYTES):
            self.stderr.add(piece)


def _ending_of(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """The child's exit status, as soon as there is one.

    A thread of its own waits for each child: on the loop's few shared threads, living engines would leave none for hashing and downloads.
    """
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[int] = loop.create_future()

    def wait() -> None:
        status = process.wait()
        # A child may outlive the loop; then nobody asks any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, ending, status)

    threading.Thread(target=wait, name=f"child {process.pid}", daemon=True).start()
    return ending


def _settle(ending: asyncio.Future[int], status: int) -> None:
    if not ending.done():
        ending.set_result(status)


async def _read_into(reader: asyncio.StreamReader, pipe: IO[bytes] | None) -> None:
    assert pipe is not None, "every pipe of a child is asked for"
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
