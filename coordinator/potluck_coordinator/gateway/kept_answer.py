"""One run of a request that named an idempotency key: what has come of its answer so far, for any number of readers.

Decides what a reader sees: all of the answer from its first byte on, whenever he came, and then what ended it. While the run is kept, all
of its bytes are; once it is let go, only those that somebody still has to read, and the run waits for its readers. It must not know keys,
who asks, or how long anything is kept.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_protocol.errors import PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.gateway.relay import PassOn
    from potluck_protocol.values import NodeId, RequestId, Usage

LAG_BYTES_MAX: Final = 1024 * 1024
"""How far a reader of an answer that is not kept may be behind before the run waits for him."""
PIECE_BYTES: Final = 64 * 1024
"""What a reader gets at a time, about, of what was there before he came."""


class Recording:
    """The answer of one run, as it grows."""

    def __init__(self, request_id: RequestId) -> None:
        self.request_id = request_id
        """The first request's."""
        self.node_id: NodeId | None = None
        """Known once the run has begun to answer."""
        self.tier = ServiceTier.DEFAULT
        """As long."""
        self.usage: Usage | None = None
        self.charge_micro_credits = 0
        self.answer_bytes = 0
        """All that ever came."""
        self.held_bytes = 0
        """Of these, that are still here."""
        self.is_over = False
        self.kept = True
        self.readers: set[KeptAnswer] = set()
        self._error: PotluckError | None = None
        self._pieces: list[bytes] = []
        self._dropped_count = 0
        """Pieces that are gone; positions count them."""
        self._changed = asyncio.Event()

    def begin(self, node_id: NodeId, tier: ServiceTier) -> None:
        """The answer begins."""
        self.node_id, self.tier = node_id, tier
        self._tell()

    def append(self, data: bytes) -> None:
        self._pieces.append(data)
        self.answer_bytes += len(data)
        self.held_bytes += len(data)
        self.trim()
        self._tell()

    def end(self, usage: Usage | None, charge_micro_credits: int, error: PotluckError | None) -> None:
        """The run is over: complete, or broken off with an error."""
        self.usage, self.charge_micro_credits, self._error, self.is_over = usage, charge_micro_credits, error, True
        self._tell()

    async def until_begun(self) -> None:
        """Returns when the answer has begun; raises what ended the run before that."""
        while self.node_id is None:
            if self.is_over:
                self.raise_end()
            await self._until_changed()

    async def until_readers_keep_up(self) -> None:
        """Returns at once while the answer is kept."""
        while not self.kept and self.held_bytes > LAG_BYTES_MAX:
            await self._until_changed()

    async def read(self, position: int) -> tuple[bytes | None, int]:
        """What comes next at a position, as soon as there is something, and the position behind it; None: the answer was complete there."""
        index = position - self._dropped_count
        while index >= len(self._pieces):
            if self.is_over:
                self.raise_end()
                return None, position
            await self._until_changed()
            index = position - self._dropped_count
        end, size_bytes = index, 0
        while end < len(self._pieces) and (end == index or size_bytes + len(self._pieces[end]) <= PIECE_BYTES):
            size_bytes += len(self._pieces[end])
            end += 1
        data = self._pieces[index] if end == index + 1 else b"".join(self._pieces[index:end])
        return data, self._dropped_count + end

    def trim(self) -> None:
        """Lets go of what nobody has to read any more; of an answer that is kept, of nothing."""
        if self.kept:
            return
        end = self._dropped_count + len(self._pieces)
        read_count = min((reader.position for reader in self.readers), default=end) - self._dropped_count
        self.held_bytes -= sum(map(len, self._pieces[:read_count]))
        del self._pieces[:read_count]
        self._dropped_count += read_count
        self._tell()

    def raise_end(self) -> None:
        """Raises what broke the run off, if anything did; each reader gets an error of his own."""
        if (error := self._error) is not None:
            raise PotluckError(error.code, error.message, param=error.param, retry_after_seconds=error.retry_after_seconds)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until_changed(self) -> None:
        await self._changed.wait()


class KeptAnswer:
    """One reader's answer: to an edge it is what `gateway.answer.Answer` is.

    Args:
        recording: what he reads; it has begun.
        stream: whether he reads it as it comes; else he is given the document.
        is_first: he began the run.
        gone: called once, when he reads no more.
    """

    def __init__(self, recording: Recording, *, stream: bool, is_first: bool, gone: Callable[[], None]) -> None:
        self._recording = recording
        self._stream = stream
        self._gone = gone
        self._read: list[bytes] = []
        self._closed = False
        self.is_first = is_first
        self.position = 0
        recording.readers.add(self)

    @property
    def node_id(self) -> NodeId:
        assert self._recording.node_id is not None, "nobody reads before the answer has begun"
        return self._recording.node_id

    @property
    def tier(self) -> ServiceTier:
        """The one it is, or was, served in."""
        return self._recording.tier

    @property
    def request_id(self) -> RequestId:
        """The first request's, under which it stands in the books."""
        return self._recording.request_id

    @property
    def usage(self) -> Usage | None:
        return self._recording.usage

    @property
    def charge_micro_credits(self) -> int:
        return self._recording.charge_micro_credits

    @property
    def document(self) -> bytes:
        """An unstreamed answer, once it is read to its end."""
        return b"".join(self._read)

    async def until_begun(self) -> None:
        """As `Recording.until_begun`."""
        await self._recording.until_begun()

    async def next_data(self, pass_on: PassOn | None = None) -> bytes | None:
        """As `Answer.next_data`, but for `pass_on`, for which there is no use: other readers have other paces."""
        del pass_on
        data, self.position = await self._recording.read(self.position)
        self._recording.trim()
        if data is not None and not self._stream:
            self._read.append(data)
        return data

    async def close(self) -> None:
        """He reads no more; the run may go on. Again is harmless."""
        if self._closed:
            return
        self._closed = True
        self._recording.readers.discard(self)
        self._recording.trim()
        self._gone()
