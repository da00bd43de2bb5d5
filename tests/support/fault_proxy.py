"""A TCP relay in front of a port, which harms its connections as lines, routers and bad cables do.

Decides nothing by itself: a test sets `upwards` (what whoever dials says) and `downwards` (what the port answers), cuts, and heals. Bytes
are carried in order or not at all; only `flip` changes any. It must not know what is in them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

PIECE_BYTES = 4096
PIECES_MAX = 4096
"""On their way in one direction of one connection, while latency holds them: 16 MiB. Beyond it the sender waits, as on a full line."""
SLACK_SECONDS = 0.02
"""What a line of a given rate saves up while it is idle: next to nothing."""


@dataclass
class Way:
    """One direction of every connection, those to come included."""

    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    """0: as fast as it goes. A few bytes a second make a slow drip."""
    pause_after_bytes: int = 0
    """Of a connection; 0: never."""
    pause_seconds: float = 0.0
    carried_bytes: int = 0
    _open: asyncio.Event = field(default_factory=asyncio.Event)
    _flips: int = 0

    def __post_init__(self) -> None:
        self._open.set()

    def stall(self) -> None:
        """Carries nothing more, and says nothing: a router that has forgotten the connection, or a machine that is frozen."""
        self._open.clear()

    def flip(self) -> None:
        """One bit of the next piece arrives changed."""
        self._flips += 1

    def heal(self) -> None:
        """Carries everything again, what was held back first."""
        self.latency_seconds = self.bytes_per_second = 0.0
        self.pause_after_bytes, self._flips = 0, 0
        self._open.set()

    async def passes(self) -> None:
        """Returns once it is not stalled."""
        await self._open.wait()

    def damaged(self, piece: bytes) -> bytes:
        self.carried_bytes += len(piece)
        if not self._flips:
            return piece
        self._flips -= 1
        return bytes([piece[0] ^ 1]) + piece[1:]


class FaultProxy:
    """The relay; `port` is where it listens."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.upwards = Way()
        self.downwards = Way()
        self.port = 0
        self.connection_count = 0
        """Those that were carried, so far."""
        self.refused_count = 0
        self._refuses = False
        self._ends: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        """Towards the one who dialled, and towards the port."""
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self, *, refuse: bool = False) -> None:
        """Every connection ends with a reset, as when a router restarts; `refuse`: new ones too, until it is healed."""
        self._refuses = refuse
        for writer in (writer for pair in self._ends for writer in pair):
            writer.transport.abort()

    def half_close(self) -> None:
        """Whoever dialled has nothing more to say on any connection, as far as the port can tell; it may still answer."""
        for _, far_writer in self._ends:
            far_writer.write_eof()

    def stall(self) -> None:
        """Both ways carry nothing more."""
        self.upwards.stall()
        self.downwards.stall()

    def heal(self) -> None:
        """All is well from now on, also for connections that live."""
        self._refuses = False
        self.upwards.heal()
        self.downwards.heal()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            self.refused_count += 1
            writer.transport.abort()
            return
        self.connection_count += 1
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self.cut(refuse=True)
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port, limit=PIECE_BYTES)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._ends.add(pair)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(self.upwards, reader, far_writer))
                pumps.create_task(_pump(self.downwards, far_reader, writer))
        finally:
            self._ends.discard(pair)


async def _pump(way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carries one direction to its end; the connection ends with it, whichever side was first."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_MAX)
    delivering = asyncio.create_task(_deliver(way, pieces, writer))
    free_at, connection_bytes, paused = loop.time(), 0, False
    try:
        while data := await reader.read(PIECE_BYTES):
            connection_bytes += len(data)
            if way.bytes_per_second:
                # A sleep that took too long is made good.
                free_at = max(free_at, loop.time() - SLACK_SECONDS) + len(data) / way.bytes_per_second
                if 0 < way.pause_after_bytes <= connection_bytes and not paused:
                    paused, free_at = True, free_at + way.pause_seconds
                await asyncio.sleep(free_at - loop.time())
            await pieces.put((loop.time() + way.latency_seconds, data))
        await pieces.put((loop.time() + way.latency_seconds, b""))
        await delivering
    except ConnectionError:
        pass
    finally:
        delivering.cancel()
        writer.transport.abort()


async def _deliver(way: Way, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while True:
            due_at, data = await pieces.get()
            await asyncio.sleep(max(0.0, due_at - loop.time()))
            await way.passes()
            if not data:
                return
            writer.write(way.damaged(data))
            await writer.drain()


@asynccontextmanager
async def fault_proxy(target_port: int) -> AsyncIterator[FaultProxy]:
    """A proxy on the running loop."""
    proxy = FaultProxy(target_port)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0, limit=PIECE_BYTES)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()


class ThreadedProxy:
    """A proxy with a loop of its own, for tests that have none."""

    def __init__(self, proxy: FaultProxy, loop: asyncio.AbstractEventLoop) -> None:
        self.proxy = proxy
        self.port = proxy.port
        self._loop = loop

    def do(self, work: Callable[[FaultProxy], None]) -> None:
        """Does it there, and waits until it is done."""
        done = threading.Event()

        def run() -> None:
            try:
                work(self.proxy)
            finally:
                done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(10), "the proxy's loop stands still"


@contextmanager
def threaded_proxy(target_port: int) -> Iterator[ThreadedProxy]:
    """A proxy in a thread."""
    ready: list[tuple[FaultProxy, asyncio.AbstractEventLoop, asyncio.Event]] = []
    started = threading.Event()

    async def serve() -> None:
        over = asyncio.Event()
        async with fault_proxy(target_port) as proxy:
            ready.append((proxy, asyncio.get_running_loop(), over))
            started.set()
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="fault proxy", daemon=True)
    thread.start()
    assert started.wait(10), "the proxy did not start"
    proxy, loop, over = ready[0]
    try:
        yield ThreadedProxy(proxy, loop)
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
