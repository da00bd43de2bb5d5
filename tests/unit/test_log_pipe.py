"""An actor's log lines: several with one write, each of them whole, and nobody waits for whoever reads them."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

import pytest

from potluck_coordinator.log_pipe import WRITE_BYTES_MAX, LogPipe

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def read_now(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 20)
    except BlockingIOError:
        return b""


async def read_soon(descriptor: int) -> bytes:
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, readable.set)
    await asyncio.wait_for(readable.wait(), 10)
    asyncio.get_running_loop().remove_reader(descriptor)
    return read_now(descriptor)


async def test_lines_of_one_moment_leave_with_one_write(ends: tuple[int, int]) -> None:
    pipe = LogPipe(ends[1], asyncio.get_running_loop())
    for number in range(3):
        pipe.write(f"line {number}\n")
        pipe.flush()
    assert read_now(ends[0]) == b""
    assert await read_soon(ends[0]) == b"line 0\nline 1\nline 2\n"
    pipe.write("another\n")
    assert await read_soon(ends[0]) == b"another\n"


async def test_what_fills_a_write_leaves_at_once_and_whole(ends: tuple[int, int]) -> None:
    pipe = LogPipe(ends[1], asyncio.get_running_loop())
    line = "x" * (WRITE_BYTES_MAX // 3) + "\n"
    for _ in range(4):
        pipe.write(line)
    at_once = read_now(ends[0])
    assert at_once == line.encode() * 2
    pipe.let_out()
    assert read_now(ends[0]) == line.encode() * 2


async def test_a_line_that_is_not_complete_waits_for_its_end(ends: tuple[int, int]) -> None:
    pipe = LogPipe(ends[1], asyncio.get_running_loop())
    pipe.write("one\nhalf ")
    pipe.let_out()
    assert read_now(ends[0]) == b"one\n"
    pipe.write("two\n")
    assert await read_soon(ends[0]) == b"half two\n"


async def test_another_thread_s_lines_leave_too(ends: tuple[int, int]) -> None:
    pipe = LogPipe(ends[1], asyncio.get_running_loop())
    thread = threading.Thread(target=pipe.write, args=("from beside\n",))
    thread.start()
    assert await read_soon(ends[0]) == b"from beside\n"
    thread.join()


def test_where_the_loop_is_closed_nothing_waits(ends: tuple[int, int]) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    LogPipe(ends[1], loop).write("last words\n")
    assert read_now(ends[0]) == b"last words\n"


async def test_a_full_pipe_loses_lines_and_costs_no_time(ends: tuple[int, int]) -> None:
    pipe = LogPipe(ends[1], asyncio.get_running_loop())
    for number in range(5_000):
        pipe.write(f"{number:050}\n")
    lines = read_now(ends[0]).decode().splitlines()
    assert lines == [f"{number:050}" for number in range(len(lines))]
    assert 1_000 < len(lines) < 5_000
