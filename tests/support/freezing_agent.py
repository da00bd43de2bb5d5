"""The agent with one fault: SIGUSR1 blocks its event loop for a while, although its process, its threads and gRPC's own go on."""

from __future__ import annotations

import signal
import time
from types import FrameType

from potluck.command import main

BLOCKED_SECONDS = 25.0


def _block(_number: int, _frame: FrameType | None) -> None:
    time.sleep(BLOCKED_SECONDS)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _block)
    main()
