"""The fault proxy harms connections as it says, so that a test that goes through it tests something."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.fault_proxy import FaultProxy, fault_proxy


class Line:
    """A connection through the proxy, and its other end behind it."""

    def __init__(self, proxy: FaultProxy, ends: list[asyncio.StreamReader | asyncio.StreamWriter]) -> None:
        self.proxy = proxy
        self.near_reader, self.near_writer, self.far_reader, self.far_writer = ends

    async def says(self, data: bytes) -> None:
        self.near_writer.write(data)
        await self.near_writer.drain()

    async def heard(self, count: int, seconds_max: float = 5) -> bytes:
        async with asyncio.timeout(seconds_max):
            return await self.far_reader.readexactly(count)


@asynccontextmanager
async def line() -> AsyncIterator[Line]:
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_server(lambda reader, writer: accepted.put_nowait((reader, writer)), "127.0.0.1", 0)
    async with fault_proxy(server.sockets[0].getsockname()[1]) as proxy:
        near = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            yield Line(proxy, [*near, *await asyncio.wait_for(accepted.get(), 5)])
        finally:
            near[1].close()
            server.close()


async def test_it_carries_bytes_as_they_are() -> None:
    async with line() as one:
        data = bytes(range(256)) * 1000
        await one.says(data)
        assert await one.heard(len(data)) == data


async def test_latency_delays_every_byte_and_does_not_slow_the_line() -> None:
    async with line() as one:
        one.proxy.upwards.latency_seconds = 0.2
        began_at = asyncio.get_running_loop().time()
        for _ in range(20):
            await one.says(b"x" * 4096)
            await asyncio.sleep(0.01)
        await one.heard(20 * 4096)
        assert 0.35 <= asyncio.get_running_loop().time() - began_at < 2, "0.2 s of saying, 0.2 s of latency, not twenty times that"


async def test_a_stall_loses_nothing_and_says_nothing_until_it_is_healed() -> None:
    async with line() as one:
        one.proxy.stall()
        await one.says(b"word")
        with pytest.raises(TimeoutError):
            await one.heard(1, 0.3)
        one.proxy.heal()
        assert await one.heard(4) == b"word"


async def test_a_drip_carries_so_many_bytes_a_second() -> None:
    async with line() as one:
        one.proxy.upwards.bytes_per_second = 100_000
        began_at = asyncio.get_running_loop().time()
        await one.says(bytes(50_000))
        await one.heard(50_000)
        assert 0.4 <= asyncio.get_running_loop().time() - began_at < 2


async def test_a_flip_changes_one_bit_once() -> None:
    async with line() as one:
        one.proxy.upwards.flip()
        await one.says(b"\x00\x00")
        assert await one.heard(2) == b"\x01\x00"
        await one.says(b"\x00\x00")
        assert await one.heard(2) == b"\x00\x00"


async def test_a_cut_ends_both_sides_and_refuses_until_it_is_healed() -> None:
    async with line() as one:
        one.proxy.cut(refuse=True)
        for reader in (one.near_reader, one.far_reader):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                async with asyncio.timeout(5):
                    await reader.readexactly(1)
        again = await asyncio.open_connection("127.0.0.1", one.proxy.port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            async with asyncio.timeout(5):
                await again[0].readexactly(1)
        assert one.proxy.refused_count == 1
        one.proxy.heal()
        await asyncio.open_connection("127.0.0.1", one.proxy.port)
        async with asyncio.timeout(5):
            while one.proxy.connection_count < 2:
                await asyncio.sleep(0.01)


async def test_a_half_closed_connection_still_carries_the_answer() -> None:
    async with line() as one:
        one.proxy.half_close()
        assert await asyncio.wait_for(one.far_reader.read(), 5) == b""
        one.far_writer.write(b"answer")
        assert await asyncio.wait_for(one.near_reader.readexactly(6), 5) == b"answer"
