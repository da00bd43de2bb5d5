"""What two nodes of one site say to each other to measure their line: a proof, some echoes, some bulk.

Decides the bytes on the wire and their bounds. Each side proves, before anything else, that it holds the secret that the coordinator gave
to these two alone, by an HMAC over both sides' fresh random numbers; who cannot gets no answer. What follows the proof is not protected: it
carries nothing but zeros. It must not know when anything is measured, nor what becomes of the figures.

    dialler:  its node id (26 bytes), 32 random bytes
    listener: 32 random bytes
    dialler:  HMAC-SHA256(secret, "dialler" + both ids + both numbers)
    listener: HMAC-SHA256(secret, "listener" + the same)
    dialler:  commands of 9 bytes, a letter and a count: E echoes, U takes so many bytes and answers one, D gives so many
"""

from __future__ import annotations

import asyncio
import hmac
import statistics
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from potluck_protocol.values import NodeId

NODE_ID_BYTES: Final = 26
_RANDOM_BYTES: Final = 32
_PROOF_BYTES: Final = 32
_COMMAND: Final = struct.Struct("!cQ")
_CHUNK: Final = bytes(64 * 1024)

PROOF_SECONDS_MAX: Final = 3.0
"""For the whole of it: who has no secret does not hold a connection for longer."""
SESSION_SECONDS_MAX: Final = 15.0
"""Of one measurement after its proof, waiting for the end of another included."""
ECHO_COUNT: Final = 21
BULK_BYTES_FIRST: Final = 256 * 1024
BULK_BYTES_MAX: Final = 32 * 1024 * 1024
"""Of one transfer. 32 MiB take 2.7 s at the slowest line that a group accepts."""
BULK_SECONDS_ENOUGH: Final = 0.25
"""A transfer that took so long has shown what the line carries; a shorter one is followed by a larger one."""
SESSION_BYTES_MAX: Final = 4 * BULK_BYTES_MAX


class PeerFailedError(Exception):
    """A peer that could not be measured; its text is for people."""


@dataclass(frozen=True, slots=True)
class LineFigures:
    """What one measurement found."""

    round_trip_microseconds: int
    bandwidth_bytes_per_second: int
    """Of the slower direction."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two sides and what they share."""

    dialler_id: NodeId
    listener_id: NodeId
    secret: bytes = field(repr=False)

    def proof(self, role: bytes, numbers: bytes) -> bytes:
        said = b"\0".join((role, self.dialler_id.encode(), self.listener_id.encode(), numbers))
        return hmac.digest(self.secret, said, "sha256")


async def measure(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    own_id: NodeId,
    peer_id: NodeId,
    secret: bytes,
    random_bytes: Callable[[int], bytes],
    now: Callable[[], float],
) -> LineFigures:
    """The dialling side, on an open connection; raises PeerFailedError, OSError, EOFError, TimeoutError."""
    async with asyncio.timeout(PROOF_SECONDS_MAX):
        await _prove(reader, writer, _Pair(own_id, peer_id, secret), random_bytes(_RANDOM_BYTES))
    async with asyncio.timeout(SESSION_SECONDS_MAX):
        round_trips = []
        for _ in range(ECHO_COUNT):
            began = now()
            await _send(writer, b"E", 0)
            await reader.readexactly(1)
            round_trips.append(now() - began)
        upwards = await _bandwidth(reader, writer, b"U", now)
        downwards = await _bandwidth(reader, writer, b"D", now)
    # The first echoes wait for the other side's turn, and for its caches.
    return LineFigures(max(1, round(statistics.median(round_trips) * 1e6)), int(min(upwards, downwards)))


async def answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    own_id: NodeId,
    secrets: Mapping[NodeId, bytes],
    turn: asyncio.Lock,
    random_bytes: Callable[[int], bytes],
) -> NodeId:
    """The listening side: serves one measurement; who was measured.

    Args:
        reader: of the accepted connection.
        writer: of the same.
        own_id: this node.
        secrets: of the peers that may come.
        turn: held while measuring: two at once would halve each other's figures.
        random_bytes: fresh ones.

    Raises:
        PeerFailedError, OSError, EOFError, TimeoutError: the connection is of no use any more. Nothing but a random number was sent to a
            peer that proved nothing.
    """
    async with asyncio.timeout(PROOF_SECONDS_MAX):
        peer_id = await _examine(reader, writer, own_id, secrets, random_bytes)
    async with asyncio.timeout(SESSION_SECONDS_MAX), turn:
        left_bytes = SESSION_BYTES_MAX
        while (command := await reader.read(1)) != b"":
            letter, count = _COMMAND.unpack(command + await reader.readexactly(_COMMAND.size - 1))
            left_bytes -= count
            if left_bytes < 0:
                raise PeerFailedError("it asked for more than a measurement takes")
            await _serve(reader, writer, letter, count)
    return peer_id


async def _prove(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair, mine: bytes) -> None:
    writer.write(pair.dialler_id.encode().ljust(NODE_ID_BYTES)[:NODE_ID_BYTES] + mine)
    await writer.drain()
    yours = await reader.readexactly(_RANDOM_BYTES)
    writer.write(pair.proof(b"dialler", mine + yours))
    await writer.drain()
    if not hmac.compare_digest(await reader.readexactly(_PROOF_BYTES), pair.proof(b"listener", mine + yours)):
        raise PeerFailedError(f"who answers is not node {pair.listener_id}")


async def _examine(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    own_id: NodeId,
    secrets: Mapping[NodeId, bytes],
    random_bytes: Callable[[int], bytes],
) -> NodeId:
    mine = random_bytes(_RANDOM_BYTES)
    peer_id = NodeId((await reader.readexactly(NODE_ID_BYTES)).decode("ascii", errors="replace").rstrip())
    yours = await reader.readexactly(_RANDOM_BYTES)
    writer.write(mine)
    await writer.drain()
    proof = await reader.readexactly(_PROOF_BYTES)
    # A node that is not expected is examined like any other, against a secret that nobody has, so that nobody learns who is expected.
    pair = _Pair(peer_id, own_id, secrets.get(peer_id) or random_bytes(_RANDOM_BYTES))
    if not hmac.compare_digest(proof, pair.proof(b"dialler", yours + mine)):
        raise PeerFailedError("it did not prove the secret of this pair")
    writer.write(pair.proof(b"listener", yours + mine))
    await writer.drain()
    return peer_id


async def _bandwidth(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, letter: bytes, now: Callable[[], float]) -> float:
    """Bytes a second of the last of a few transfers, each larger than the one before until one took long enough."""
    count = BULK_BYTES_FIRST
    while True:
        began = now()
        await _send(writer, letter, count)
        if letter == b"U":
            await _give(writer, count)
            await reader.readexactly(1)
        else:
            await _take(reader, count)
        seconds = max(now() - began, 1e-6)
        if seconds >= BULK_SECONDS_ENOUGH or count >= BULK_BYTES_MAX:
            return count / seconds
        # Near the limit at once: what is left of SESSION_BYTES_MAX allows no long climb.
        count = BULK_BYTES_MAX if seconds < BULK_SECONDS_ENOUGH / 16 else min(BULK_BYTES_MAX, count * 4)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, letter: bytes, count: int) -> None:
    match letter:
        case b"E":
            writer.write(b"\0")
        case b"U":
            await _take(reader, count)
            writer.write(b"\0")
        case b"D":
            await _give(writer, count)
        case _:
            raise PeerFailedError("it asked for something that is no measurement")
    await writer.drain()


async def _send(writer: asyncio.StreamWriter, letter: bytes, count: int) -> None:
    writer.write(_COMMAND.pack(letter, count))
    await writer.drain()


async def _give(writer: asyncio.StreamWriter, count: int) -> None:
    while count > 0:
        writer.write(_CHUNK[:count] if count < len(_CHUNK) else _CHUNK)
        count -= len(_CHUNK)
        await writer.drain()


async def _take(reader: asyncio.StreamReader, count: int) -> None:
    while count > 0:
        piece = await reader.read(min(count, len(_CHUNK)))
        if not piece:
            raise PeerFailedError("the connection ended in the middle of a transfer")
        count -= len(piece)
