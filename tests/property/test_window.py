"""A node and its gateway never wait for each other, whatever an engine writes in one piece."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.gateway.relay import Relay
from potluck_node.delivery import Delivery, ResponseHead
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, EndReason

ATTEMPT = AttemptId("attempt")


class Pair:
    """The two ends of one attempt, with nothing between them."""

    def __init__(self, window_bytes: int) -> None:
        self.delivery = Delivery(ATTEMPT, window_bytes)
        self.relay = Relay(ATTEMPT, window_bytes, 0.0, lambda _, sequence: self.delivery.acknowledge(sequence))
        self.received = b""

    async def send(self, piece_bytes: int, *, first: bool) -> None:
        while not self.delivery.has_room(piece_bytes):
            progress = await self.read()
            assert progress or self.delivery.has_room(piece_bytes), "the node waits for room, and the client for bytes"
        self.delivery.push(b"x" * piece_bytes, ResponseHead(200, "text/plain") if first else None)
        frame = node_pb2.NodeFrame()
        self.delivery.move_into(frame, 1 << 30)
        for chunk in frame.chunks:
            self.relay.receive(chunk.sequence, chunk.data, 0.0)

    async def read(self) -> bool:
        """What waits for the client; False where it has everything, and the node knows as much as it will."""
        reading = asyncio.ensure_future(self.relay.next_data())
        await asyncio.sleep(0)
        if reading.done():
            self.received += reading.result() or b""
            return True
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        return False


async def relay_all(window_bytes: int, pieces: list[tuple[int, bool]]) -> int:
    pair = Pair(window_bytes)
    for number, (piece_bytes, read_after) in enumerate(pieces):
        await pair.send(piece_bytes, first=number == 0)
        if read_after:
            await pair.read()
    pair.relay.end(len(pieces), EndReason.COMPLETED, "")
    while (data := await pair.relay.next_data()) is not None:
        pair.received += data
    return len(pair.received)


@given(st.integers(min_value=1, max_value=200), st.lists(st.tuples(st.integers(min_value=0, max_value=500), st.booleans()), max_size=40))
def test_every_piece_gets_through(window_bytes: int, pieces: list[tuple[int, bool]]) -> None:
    assert asyncio.run(relay_all(window_bytes, pieces)) == sum(piece_bytes for piece_bytes, _ in pieces)
