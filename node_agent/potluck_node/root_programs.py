"""Programs that are started as root, by `sudo -n`, which asks nobody anything.

Decides how long one is waited for, and that one which takes longer is left alone: what runs as root is not a plain user's to end, and the
try would leave us waiting for it without bound. It must not know what the programs do.
"""

from __future__ import annotations

import os
import subprocess
from typing import Final

SAFE_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"


class UnendedError(Exception):
    """The program was still at work after the wait; what it was started for, it may yet do."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__()
        self.process = process


def run_as_root(arguments: tuple[str, ...], seconds_max: float) -> tuple[int, str]:
    """Its exit code, and what it said of a failure.

    Args:
        arguments: sudo's, after `-n`.
        seconds_max: how long it is waited for.

    Raises:
        OSError: it could not be started.
        UnendedError: it has not ended.
    """
    process = subprocess.Popen(
        ("sudo", "-n", *arguments),
        env={"PATH": os.environ.get("PATH", SAFE_PATH), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        _, words = process.communicate(timeout=seconds_max)
    except subprocess.TimeoutExpired:
        if process.stderr is not None:
            process.stderr.close()
        raise UnendedError(process) from None
    return process.returncode, words
