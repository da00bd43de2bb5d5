"""An engine that runs out of memory while it is asked to take more than fits, and is a real one otherwise.

Run as a script: `python starved_engine.py --takes 95/4/2048 --fits 85/4/2048 -- ARGUMENT…`. Of share of memory, slots and context none may
be above what fits; then the real engine takes this process over. What it says before it fails are vLLM's words, in vLLM's form: that memory
ran out, or, with `--free FILE`, that others hold all but as many percent of the card as the file says.
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
(EngineCore pid=15) ERROR 11-21 21:36:14 [core.py:1145] {error}
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)     raise RuntimeError(
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}"""
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.74 GiB. GPU 0 has a total capacity of 23.57 GiB of which \
1.06 GiB is free."
HELD_BY_OTHERS = "ValueError: Free memory on device cuda:0 ({free:.2f}/23.57 GiB) on startup is less than desired GPU memory utilization \
({share:.2f}, {wanted:.2f} GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."


@dataclass(frozen=True, slots=True)
class StarvedEngine:
    """A real engine that only fits with so much.

    Attributes:
        real: the one that runs where it fits.
        fits: share of memory in percent, slots, and tokens of a slot's context.
        free: a file with the share of the card that others leave, in percent; None: nobody else uses it.
    """

    real: object
    fits: tuple[int, int, int]
    free: Path | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def arguments(self, launch) -> tuple[str, ...]:
        takes = (launch.memory_utilization_percent, launch.slot_count, launch.context_length_tokens)
        words = ("/".join(str(number) for number in numbers) for numbers in (takes, self.fits))
        free = ("--free", str(self.free)) if self.free is not None else ()
        return (str(Path(__file__).resolve()), "--takes", next(words), "--fits", next(words), *free, "--", *self.real.arguments(launch))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--takes", required=True)
    parser.add_argument("--fits", required=True)
    parser.add_argument("--free", type=Path)
    parser.add_argument("real", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    takes, fits = ([int(number) for number in numbers.split("/")] for numbers in (options.takes, options.fits))
    if options.free is not None and takes[0] > (free := float(options.free.read_text())):
        error = HELD_BY_OTHERS.format(free=free / 100 * 23.57, share=takes[0] / 100, wanted=takes[0] / 100 * 23.57)
        raise SystemExit(VLLM_SAYS.format(error=error))
    if any(taken > fitting for taken, fitting in zip(takes, fits, strict=True)):
        raise SystemExit(VLLM_SAYS.format(error=OUT_OF_MEMORY))
    real = options.real[1:] if options.real[:1] == ["--"] else options.real
    os.execv(sys.executable, [sys.executable, "-P", *real])


if __name__ == "__main__":
    main()
