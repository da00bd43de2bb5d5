"""The process that outlives a coordinator only to clear up after it.

Decides what is left of a run once its coordinator is gone, however it went: nothing. Every process that belongs to the run is killed, and
the run's folder is removed. It must not know what those processes are. Ray ends its own when the driver dies, but some of them take their
time over it, and nobody removes the folder.

A process belongs to the run if it carries the run's mark in its environment or has a file of the run's folder open. Neither is enough by
itself: one that sets its title, as Ray's do, overwrites what the system shows of its environment, and a young one has nothing open yet.

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
    """Kills what belongs to the run and removes its folder; False if some process would not die. Spares the caller and its parent."""
    for _ in range(SWEEP_COUNT_MAX):
        left = _processes_of(run_dir)
        if not left:
            break
        for process_id in left:
            _kill(process_id)
        time.sleep(SWEEP_PAUSE_SECONDS)
    else:
        return False
    shutil.rmtree(run_dir, ignore_errors=True)
    return True


def _processes_of(run_dir: Path) -> list[int]:
    """Found by what /proc tells. Without /proc there are none to find, and Ray's own watch has to do."""
    mark = f"{RUN_MARK}={run_dir}".encode()
    inside = f"{run_dir.resolve()}/"
    spared = {os.getpid(), os.getppid()}
    folders = (folder for folder in Path("/proc").glob("[0-9]*") if int(folder.name) not in spared)
    return [int(folder.name) for folder in folders if _is_marked(folder, mark) or _has_open_file(folder, inside)]


def _is_marked(folder: Path, mark: bytes) -> bool:
    with suppress(OSError):  # another user's, or gone
        return mark in (folder / "environ").read_bytes().split(b"\0")
    return False


def _has_open_file(folder: Path, inside: str) -> bool:
    with suppress(OSError):
        for link in (folder / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if str(link.readlink()).startswith(inside):
                    return True
    return False


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
