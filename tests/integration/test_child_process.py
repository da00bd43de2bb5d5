"""Children of the agent: heard and ended without a thread that the rest of the agent needs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import psutil
import pytest

from potluck_node.child_process import ChildProcess
from tests.support.pool import marked_processes, until

SLEEPS = ("-c", "import time; time.sleep(60)")


@asynccontextmanager
async def children(count: int) -> AsyncIterator[list[ChildProcess]]:
    spawned = [ChildProcess.spawn(SLEEPS, os.environ) for _ in range(count)]
    try:
        yield spawned
    finally:
        for child in spawned:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        await asyncio.gather(*(child.stop() for child in spawned))


async def test_living_children_leave_the_loops_threads_to_others():
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=2))
    async with children(3):
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 5) == "done"


async def test_each_end_is_heard_however_often_it_is_asked_for():
    async with children(3) as spawned:
        os.kill(spawned[1].pid, signal.SIGTERM)
        assert await asyncio.wait_for(spawned[1].wait(), 5) == "signal SIGTERM"
        assert await spawned[1].wait() == "signal SIGTERM"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(spawned[0].wait(), 0.05)
        await asyncio.wait_for(spawned[0].stop(), 5)
        assert await spawned[0].wait() == "signal SIGTERM"
    short = ChildProcess.spawn(("-c", "raise SystemExit(3)"), os.environ)
    assert await asyncio.wait_for(short.wait(), 10) == "exit status 3"
    await short.stop()


@pytest.mark.parametrize("turn_count", range(8))
async def test_whoever_is_cancelled_about_a_start_leaves_no_child(turn_count):
    mark = str(uuid.uuid4())

    async def spawn_and_stop() -> None:
        child = ChildProcess.spawn(SLEEPS, {**os.environ, "POTLUCK_TEST_MARK": mark})
        try:
            await child.wait()
        finally:
            await child.stop()

    task = asyncio.create_task(spawn_and_stop())
    for _ in range(turn_count):
        await asyncio.sleep(0)
    # Without a turn of the loop: a process that has just begun does not show its environment yet.
    was_started = until(lambda: bool(marked_processes(mark)), 5.0 if turn_count else 0.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert was_started == (turn_count > 0)
    assert marked_processes(mark) == []


PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.timed
@pytest.mark.parametrize("order", [None, signal.SIGSTOP])
async def test_a_killed_child_leaves_nothing_of_its_group_not_even_what_was_stopped(order):
    child = ChildProcess.spawn(("-c", PARENT), os.environ)
    grandchild_pid = int(await asyncio.wait_for(child.first_line(), 10))
    if order is not None:
        os.killpg(child.pid, order)
    began = time.monotonic()
    await child.kill()
    assert time.monotonic() - began < 2.0
    assert not psutil.pid_exists(grandchild_pid)
    assert await child.wait() == "signal SIGKILL"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_child_that_outlives_its_loop_disturbs_nobody(monkeypatch):
    faults: list[object] = []
    monkeypatch.setattr(threading, "excepthook", faults.append)

    async def spawn_and_go() -> int:
        return ChildProcess.spawn(SLEEPS, os.environ).pid

    pid = asyncio.run(spawn_and_go())
    (thread,) = [thread for thread in threading.enumerate() if thread.name == f"child {pid}"]
    assert thread.daemon, "the agent's own end waits for no child"
    os.killpg(pid, signal.SIGKILL)
    thread.join(10)
    gc.collect()
    assert not thread.is_alive()
    assert faults == []
