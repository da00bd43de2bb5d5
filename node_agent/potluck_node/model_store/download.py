"""One run of a package client that puts a file into a folder: watched, bounded, and gone when the agent is.

Decides when a download counts as stalled and how its failure reads. It must not know what is downloaded. Progress is the folder's size, so
any client will do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from potluck_node.child_process import ChildProcess

POLL_SECONDS: Final = 0.25
STALL_LIMIT_SECONDS: Final = 180.0
"""A download that brings nothing for so long is ended, and tried again after the plan's backoff."""
FAILURE_LINES: Final = 4

OnProgress = Callable[[int], None]
"""Called with the bytes that are here."""


class FetchFailedError(Exception):
    """A file that could not be fetched; its text is one or a few lines for people."""


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take, at any depth; files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except OSError:
                continue
    return total


async def run_client(arguments: Sequence[str], *, name: str, folder: Path, environment: Mapping[str, str], on_progress: OnProgress) -> None:
    """Runs `python ARGUMENT…` to its end; raises FetchFailedError, which speaks of the client by its name."""
    try:
        child = ChildProcess.spawn(arguments, environment)
    except OSError as error:
        raise FetchFailedError(f"{name} could not be started: {error}") from error
    draining = asyncio.create_task(child.drain_stdout())
    try:
        await _watch(child, folder, on_progress)
        if ending := await child.wait():
            raise FetchFailedError(f"{name} ended with {ending}\n{child.stderr.text(FAILURE_LINES)}".rstrip())
    finally:
        draining.cancel()
        await child.stop()


async def _watch(child: ChildProcess, folder: Path, on_progress: OnProgress) -> None:
    loop = asyncio.get_running_loop()
    ending = asyncio.create_task(child.wait())
    present_bytes, grown_at = -1, loop.time()
    try:
        while not ending.done():
            await asyncio.wait({ending}, timeout=POLL_SECONDS)
            now_bytes = await asyncio.to_thread(folder_bytes, folder)
            if now_bytes != present_bytes:
                present_bytes, grown_at = now_bytes, loop.time()
                on_progress(now_bytes)
            elif loop.time() - grown_at > STALL_LIMIT_SECONDS:
                raise FetchFailedError(f"the download brought nothing for {STALL_LIMIT_SECONDS:.0f} s")
    finally:
        ending.cancel()
