"""`python -m tests.benchmarks.kept_engine ARGUMENTS…` keeps an engine: Python with these arguments, started again whenever it dies.

What an operator's service manager does for engines that stand behind a bare router; Potluck's agent does it itself. Decides nothing but the
pause between two starts. It must not know why an engine died.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Final

RESTART_SECONDS: Final = 0.5


def main() -> None:
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    while True:
        # The engine ends with this process: its standard input is ours to close.
        with subprocess.Popen([sys.executable, *sys.argv[1:], "--lifeline"], stdin=subprocess.PIPE) as engine:
            engine.wait()
            print(f"the engine ended with {engine.returncode}", file=sys.stderr, flush=True)
        time.sleep(RESTART_SECONDS)


if __name__ == "__main__":
    main()
