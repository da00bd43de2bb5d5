"""An engine that runs out of memory while it is asked to take more than fits, and is a real one otherwise.

Run as a script: `python starved_engine.py --takes 95/4/2048 --fits 85/4/2048 -- ARGUMENT…`. Of share of memory, slots and context none may
be above what fits; then the real engine takes this process over. What it says before it fails are vLLM's words, in vLLM's form.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

VLLM_SAYS = """\
(EngineCore pid=15) INFO 11-21 21:36:11 [core.py:105] Initializing a V1 LLM engine
(EngineCore pid=15) ERROR 11-21 21:36:14 [core.py:1145] EngineCore failed to start.
(EngineCore pid=15) ERROR 11-21 21:36:14 [core.py:1145] Traceback (most recent call last):
(EngineCore pid=15) ERROR 11-21 21:36:14 [core.py:1145]     raise ValueError(
(EngineCore pid=15) ERROR 11-21 21:36:14 [core.py:1145] ValueError: Free memory on device cuda:0 (20.9/23.57 GiB) on startup is less \
than desired GPU memory utilization ({share:.2f}, {wanted:.2f} GiB). Decrease GPU memory utilization or reduce GPU memory used by other \
processes.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)     raise RuntimeError(
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}"""


@dataclass(frozen=True, slots=True)
class StarvedEngine:
    """A real engine that only fits with so much.

    Attributes:
        real: the one that runs where it fits.
        fits: share of memory in percent, slots, and tokens of a slot's context.
    """

    real: object
    fits: tuple[int, int, int]

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def arguments(self, launch) -> tuple[str, ...]:
        takes = (launch.memory_utilization_percent, launch.slot_count, launch.context_length_tokens)
        words = ("/".join(str(number) for number in numbers) for numbers in (takes, self.fits))
        return (str(Path(__file__).resolve()), "--takes", next(words), "--fits", next(words), "--", *self.real.arguments(launch))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--takes", required=True)
    parser.add_argument("--fits", required=True)
    parser.add_argument("real", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    takes, fits = ([int(number) for number in numbers.split("/")] for numbers in (options.takes, options.fits))
    if any(taken > fitting for taken, fitting in zip(takes, fits, strict=True)):
        raise SystemExit(VLLM_SAYS.format(share=takes[0] / 100, wanted=takes[0] / 100 * 23.57))
    real = options.real[1:] if options.real[:1] == ["--"] else options.real
    os.execv(sys.executable, [sys.executable, "-P", *real])


if __name__ == "__main__":
    main()
