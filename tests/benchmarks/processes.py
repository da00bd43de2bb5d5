"""Starts and stops what is measured, and reads CPU time and memory of processes from the kernel.

Decides how a child is ended: asked first, killed after a bound, and never by name. It must not know what the processes are for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STOP_SECONDS_MAX: Final = 15.0
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_PROCESS_CLOCK: Final = 2
_LIBC: Final = ctypes.CDLL(None)
_SET_PARENT_DEATH_SIGNAL: Final = 1


def cpu_seconds(process_id: int) -> float | None:
    """CPU time of all threads of a process since it began, ended threads included, to the nanosecond; None once it is gone.

    `/proc/PID/schedstat` counts the first thread alone and `/proc/PID/stat` counts in ticks of 10 ms; the process's own clock does neither.
    """
    try:
        return time.clock_gettime_ns((~process_id << 3) | _PROCESS_CLOCK) / 1e9
    except OSError:
        return None


def resident_bytes(process_id: int) -> int:
    """Resident memory; 0 once the process is gone."""
    try:
        return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def machine_busy_seconds() -> float:
    """CPU time that the whole machine has spent on anything, all cores together."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / _TICKS_PER_SECOND


def title(process_id: int) -> str:
    """The command line as the process shows it; empty once it is gone."""
    try:
        return Path(f"/proc/{process_id}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def descendants(process_id: int) -> tuple[int, ...]:
    """All living children, their children and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [process_id]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            found.append(child)
            waiting.append(child)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class CpuReading:
    """CPU time by process, and of the machine, at one moment."""

    at_seconds: float
    by_process: Mapping[int, float]
    machine_busy_seconds: float

    @classmethod
    def take(cls, process_ids: Sequence[int]) -> CpuReading:
        readings = {process_id: seconds for process_id in process_ids if (seconds := cpu_seconds(process_id)) is not None}
        return cls(time.monotonic(), readings, machine_busy_seconds())

    def spent_since(self, earlier: CpuReading, process_ids: Sequence[int]) -> float:
        """Seconds that these processes spent in between; a process that was not there both times counts nothing."""
        return sum(
            self.by_process[process_id] - earlier.by_process[process_id]
            for process_id in process_ids
            if process_id in self.by_process and process_id in earlier.by_process
        )

    def foreign_share_since(self, earlier: CpuReading, process_ids: Sequence[int]) -> float:
        """What the machine did for others in between, as a share of all it could have done."""
        seconds = self.at_seconds - earlier.at_seconds
        if seconds <= 0:
            return 0.0
        busy = self.machine_busy_seconds - earlier.machine_busy_seconds - self.spent_since(earlier, process_ids)
        return min(1.0, max(0.0, busy / seconds / (os.cpu_count() or 1)))


class Child:
    """One process that the benchmark started, with what it prints kept in a file."""

    def __init__(
        self,
        command: Sequence[str],
        log_file: Path,
        *,
        environment: Mapping[str, str] | None = None,
        cores: frozenset[int] = frozenset(),
        pipe: bool = False,
    ) -> None:
        self._log_file = log_file
        channel = subprocess.PIPE if pipe else subprocess.DEVNULL
        # Without a buffer Python writes a long line in parts, and may drop those that the pipe did not take at once.
        buffered = {"PYTHONUNBUFFERED": ""} if pipe else {}
        with log_file.open("ab") as log, _on_cores(cores):
            self.process = subprocess.Popen(
                command,
                stdin=channel,
                stdout=channel if pipe else log,
                stderr=log,
                env={**os.environ, **buffered, **(environment or {})},
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - the harness has one thread
            )

    @property
    def process_id(self) -> int:
        return self.process.pid

    @property
    def family(self) -> tuple[int, ...]:
        """The process and all that it started."""
        return (self.process_id, *descendants(self.process_id))

    def log_tail(self, line_count: int = 8) -> str:
        """The last lines that it printed."""
        return "\n".join(self._log_file.read_text(errors="replace").splitlines()[-line_count:])

    def ask(self, line: str) -> str:
        """The line with which a child with a pipe answers this one; raises RuntimeError, with what it said last, once it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args!r} ended:\n{self.log_tail()}")
        return answer.decode()

    def check_alive(self) -> None:
        """Raises RuntimeError, with what it said last, once it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.returncode}:\n{self.log_tail()}")

    def stop(self) -> None:
        """Ends the process and whatever it leaves behind."""
        family = [Handle(process_id) for process_id in descendants(self.process_id)]
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_SECONDS_MAX)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        for handle in family:
            handle.send(signal.SIGKILL)
            handle.close()


class Handle:
    """Names one process for good; its number may soon be another's."""

    def __init__(self, process_id: int) -> None:
        try:
            self._descriptor: int | None = os.pidfd_open(process_id)
        except OSError:
            self._descriptor = None

    def send(self, signal_number: int) -> None:
        """Does nothing to a process that is gone."""
        if self._descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal_number)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _end_with_parent() -> None:
    """Has the kernel send SIGTERM when the harness dies, however it does."""
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


@contextlib.contextmanager
def _on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Whatever is started inside stays on these cores, with all its threads and children; no cores means all."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """A loopback port that was free a moment ago, for programs that cannot say which they took."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
