"""A node and its gateway never wait for each other, whatever an engine writes in one piece."""

from __future__ import annotations

import asyncio
from enum import Enum

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.gateway.relay import Relay
from potluck_node.delivery import Delivery, ResponseHead
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, EndReason

ATTEMPT = AttemptId("attempt")


class Reader(Enum):
    """What the client's side does once a piece has been sent."""

    BUSY = "neither reads nor waits"
    READS = "reads what is there"
    WAITS = "waits, and takes whatever comes"
    FULL = "waits, and takes one piece more"


class Pair:
    """The two ends of one attempt, with nothing between them."""

    def __init__(self, window_bytes: int) -> None:
        self.delivery = Delivery(ATTEMPT, window_bytes)
        self.relay = Relay(ATTEMPT, window_bytes, 0.0, lambda _, sequence: self.delivery.acknowledge(sequence))
        self.received = b""
        self.waiting: asyncio.Future[bytes | None] | None = None
        self.takes_more = True

    async def send(self, piece: bytes, *, first: bool) -> None:
        while not self.delivery.has_room(len(piece)):
            progress = await self.read()
            assert progress or self.delivery.has_room(len(piece)), "the node waits for room, and the client for bytes"
        self.delivery.push(piece, ResponseHead(200, "text/plain") if first else None)
        frame = node_pb2.NodeFrame()
        self.delivery.move_into(frame, 1 << 30)
        for chunk in frame.chunks:
            self.relay.receive(chunk.sequence, chunk.data, 0.0)

    def take(self, data: bytes) -> bool:
        self.received += data
        return self.takes_more

    async def wait(self) -> None:
        """A reader that waits from here on, and gets what comes without being asked."""
        if self.waiting is not None and self.waiting.done():
            await self.read()
        if self.waiting is None:
            self.waiting = asyncio.ensure_future(self.relay.next_data(self.take))
            await asyncio.sleep(0)

    async def read(self) -> bool:
        """What waits for the client; False where it has everything, and the node knows as much as it will."""
        reading = self.waiting or asyncio.ensure_future(self.relay.next_data())
        self.waiting = None
        await asyncio.sleep(0)
        if reading.done():
            self.received += reading.result() or b""
            return True
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        return False


async def relay_all(window_bytes: int, pieces: list[tuple[bytes, Reader]]) -> bytes:
    pair = Pair(window_bytes)
    for number, (piece, reader) in enumerate(pieces):
        pair.takes_more = reader is not Reader.FULL
        await pair.send(piece, first=number == 0)
        if reader is Reader.READS:
            await pair.read()
        elif reader is not Reader.BUSY:
            await pair.wait()
    pair.relay.end(len(pieces), EndReason.COMPLETED, "")
    while (data := await (pair.waiting or pair.relay.next_data())) is not None:
        pair.waiting = None
        pair.received += data
    return pair.received


sizes_bytes = st.integers(min_value=0, max_value=500)


@given(st.integers(min_value=1, max_value=200), st.lists(st.tuples(sizes_bytes, st.sampled_from(Reader)), max_size=40))
def test_every_piece_gets_through(window_bytes: int, steps: list[tuple[int, Reader]]) -> None:
    pieces = [(bytes([number]) * size_bytes, reader) for number, (size_bytes, reader) in enumerate(steps)]
    assert asyncio.run(relay_all(window_bytes, pieces)) == b"".join(piece for piece, _ in pieces)
