"""The process that outlives a coordinator only to clear up after it.

Decides what is left of a run once its coordinator is gone, however it went: nothing. Every process that carries the run's mark is killed,
and the run's folder is removed. It must not know what those processes are. Ray ends its own when the driver dies, but some of them take
their time over it, and nobody removes the folder.

The coordinator holds the writing end of the warden's standard input; the end of that file is the end of the coordinator.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

RUN_MARK: Final = "POTLUCK_RUN"
"""The environment variable that every process of a run inherits; its value is the run's folder."""
SWEEP_COUNT_MAX: Final = 50
SWEEP_PAUSE_SECONDS: Final = 0.1


class Warden:
    """The coordinator's end: made before anything that must not be left behind."""

    def __init__(self, run_dir: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # A session of its own: the terminal's Ctrl-C is not meant for it.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe: IO[bytes] = self._process.stdin
        os.environ[RUN_MARK] = str(run_dir)

    def dismiss(self, timeout_seconds: float) -> bool:
        """Has it clear up now; whether it was done in time."""
        os.environ.pop(RUN_MARK, None)
        self._pipe.close()
        try:
            return self._process.wait(timeout_seconds) == 0
        except subprocess.TimeoutExpired:
            return False


def sweep(run_dir: Path) -> bool:
    """Kills what carries the run's mark and removes its folder; False if some process would not die."""
    mark = f"{RUN_MARK}={run_dir}".encode()
    for _ in range(SWEEP_COUNT_MAX):
        marked = _processes_with(mark)
        if not marked:
            break
        for process_id in marked:
            _kill(process_id)
        time.sleep(SWEEP_PAUSE_SECONDS)
    else:
        return False
    shutil.rmtree(run_dir, ignore_errors=True)
    return True


def _processes_with(mark: bytes) -> list[int]:
    """By the environment they were started with. Without /proc there are none to find, and Ray's own watch has to do."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # another user's, or gone
            continue
        if mark in environment.split(b"\0") and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def _kill(process_id: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)


def main() -> int:
    """Waits for the coordinator's end, then sweeps. A polite signal does not end the watch: the coordinator does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    return 0 if sweep(Path(sys.argv[1])) else 1


if __name__ == "__main__":
    sys.exit(main())
