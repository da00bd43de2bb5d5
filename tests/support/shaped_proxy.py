"""A TCP relay that carries so many bytes a second each way, as a home's line does, and may stand still once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

PIECE_BYTES = 4096
SLACK_SECONDS = 0.02


@dataclass
class ShapedProxy:
    """The relay."""

    target_port: int
    upwards_bytes_per_second: int
    downwards_bytes_per_second: int
    still_after_bytes: int = 0
    """Either way; 0: never."""
    still_seconds: float = 0.0
    port: int = 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port, limit=PIECE_BYTES)
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(self._pump(reader, far_writer, self.upwards_bytes_per_second))
            pumps.create_task(self._pump(far_reader, writer, self.downwards_bytes_per_second))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bytes_per_second: int) -> None:
        loop = asyncio.get_running_loop()
        free_at, carried_bytes, stood_still = loop.time(), 0, False
        try:
            while data := await reader.read(PIECE_BYTES):
                # A line that was idle has saved up next to nothing; a sleep that took too long is made good.
                free_at = max(free_at, loop.time() - SLACK_SECONDS) + len(data) / bytes_per_second
                carried_bytes += len(data)
                if self.still_after_bytes and carried_bytes >= self.still_after_bytes and not stood_still:
                    stood_still, free_at = True, free_at + self.still_seconds
                await asyncio.sleep(free_at - loop.time())
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()


@asynccontextmanager
async def shaped_proxy(target_port: int, upwards_bytes_per_second: int, downwards_bytes_per_second: int) -> AsyncIterator[ShapedProxy]:
    proxy = ShapedProxy(target_port, upwards_bytes_per_second, downwards_bytes_per_second)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(proxy.carry(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=PIECE_BYTES)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
