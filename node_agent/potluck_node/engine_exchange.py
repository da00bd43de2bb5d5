"""A request to an engine on loopback and its answer: HTTP/1.1 as httptools reads it.

Decides how connections to engines are made, kept and closed, and how much of an answer is read ahead of its reader, who may leave a
function that takes what comes without a task's turn for each piece. It must not know what is asked, nor what an answer says.

What asks an engine once in a while has a client of its own (`engine_session`), which does more and takes about 0.15 ms for a request; this
one is for the answers that people wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, TypeAlias, cast
from urllib.parse import SplitResult, urlsplit

import httptools

CONNECT_SECONDS_MAX: Final = 5.0
IDLE_SECONDS_MAX: Final = 2.0
"""Less than engines keep an idle connection (5 s): one that the engine closes while we write would fail a good request."""
READ_AHEAD_BYTES: Final = 64 * 1024
"""Of an answer, before its connection is read no further: TCP then holds the engine up."""
HEAD_BYTES_MAX: Final = 64 * 1024
_ANSWER_STATUS_MIN: Final = 200
"""Below are words that an answer is to come."""

Take: TypeAlias = Callable[[bytes], bool]
"""Takes a piece at once, or does nothing with it: whether it was taken. Its errors are the reader's."""


class EngineUnreachableError(OSError):
    """Nobody takes connections there."""


class AnswerBrokenError(OSError):
    """The connection ended before the answer did, or what came over it is no answer."""


class EngineConnections:
    """The agent's connections to its engines."""

    def __init__(self) -> None:
        self._idle: dict[str, list[_Connection]] = {}
        """By the engine's URL; the one that was used last is used next."""

    async def ask(self, url: str, path: str, headers: Mapping[str, str], body: bytes) -> EngineAnswer:
        """Posts a request; its answer once its head has come. Whoever gets it closes it.

        Args:
            url: the engine's root, such as `http://127.0.0.1:40123`.
            path: of the endpoint below it.
            headers: beside those that say where it goes and how long it is.
            body: of the request.

        Raises:
            EngineUnreachableError: no connection could be made.
            TimeoutError: none was made in time.
            AnswerBrokenError: it ended before the answer's head.
        """
        connection = self._take_idle(url) or await self._connect(url)
        answer = EngineAnswer(connection)
        connection.ask(answer, _head_of(url, path, headers, len(body)), body)
        try:
            await answer.wait_for_head()
        except BaseException:
            answer.close()
            raise
        return answer

    def close(self) -> None:
        """Closes what nobody uses now."""
        for connections in self._idle.values():
            for connection in tuple(connections):
                connection.drop()

    def _take_idle(self, url: str) -> _Connection | None:
        # uvloop tells of a connection's end a turn after it has noticed it.
        return next((connection for connection in reversed(self._idle.get(url, ())) if connection.is_open), None)

    async def _connect(self, url: str) -> _Connection:
        place = _place_of(url)
        idle = self._idle.setdefault(url, [])
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(lambda: _Connection(idle), place.hostname or "", place.port or 80)
        except TimeoutError:
            raise
        except OSError as error:
            raise EngineUnreachableError(*error.args) from error
        return connection


class EngineAnswer:
    """One answer. Made by `EngineConnections.ask`, and closed by whoever got it."""

    __slots__ = ("_bytes", "_complete", "_connection", "_error", "_pieces", "_take", "_waiter", "content_type", "http_status")

    def __init__(self, connection: _Connection) -> None:
        self.http_status = 0
        self.content_type = ""
        self._connection: _Connection | None = connection
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._complete = False
        self._error: Exception | None = None
        self._take: Take | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def wait_for_head(self) -> None:
        """Returns once status and content type are known; raises AnswerBrokenError."""
        while not self.http_status:
            await self._until_more()

    async def read(self, bytes_max: int, take: Take | None = None) -> bytes:
        """The next bytes, at most so many; none at the answer's end. What comes while this waits goes to `take`, until it takes no more.

        Raises:
            AnswerBrokenError: it ended before that.
            Exception: whatever `take` raised.
        """
        while not self._pieces:
            if self._complete and self._error is None:
                return b""
            self._take = take
            try:
                await self._until_more()
            finally:
                self._take = None
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = [data[bytes_max:]] if len(data) > bytes_max else []
        self._bytes = len(data) - bytes_max if self._pieces else 0
        if self._connection is not None and self._bytes < READ_AHEAD_BYTES:
            self._connection.go_on()
        return data[:bytes_max]

    def close(self) -> None:
        """Nobody reads it any more. Of one that is not over the connection is closed, which tells the engine to stop."""
        self._take = None
        if self._connection is not None:
            self._connection.drop()
            self._connection = None

    async def _until_more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What its connection tells.

    def begin(self, http_status: int, content_type: str) -> None:
        """Its head has come."""
        self.http_status, self.content_type = http_status, content_type
        self._wake()

    def put(self, data: bytes) -> bool:
        """The next bytes have come; whether more may be read ahead."""
        if self._take is not None and not self._pieces:
            try:
                if self._take(data):
                    return True
            except Exception as error:  # noqa: BLE001 - the reader's own, raised where it reads
                self.break_off(error)
                return True
        self._take = None
        self._pieces.append(data)
        self._bytes += len(data)
        self._wake()
        return self._bytes < READ_AHEAD_BYTES

    def end(self) -> None:
        """It is whole, and its connection somebody else's."""
        self._complete, self._connection = True, None
        self._wake()

    def break_off(self, error: Exception) -> None:
        """Nothing more will come."""
        if self._error is None and not self._complete:
            self._error = error
            self._wake()


class _Connection(asyncio.Protocol):
    """One at a time asks over it.

    Args:
        idle: where it waits between two requests.
    """

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._answer: EngineAnswer | None = None
        self._pieces: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_reading = True
        self._parser: Any = None
        self._head_bytes = 0
        self._content_type = ""
        self._has_length = False
        """The answer says where it ends; otherwise that is where the connection does."""
        self._is_over = self._can_stay = False
        self._says_more = False
        """Than it was asked."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpResponseParser(self)

    @property
    def is_open(self) -> bool:
        """Something may be sent."""
        return not self._transport.is_closing()

    def ask(self, answer: EngineAnswer, head: bytes, body: bytes) -> None:
        """Sends a request, whose answer hears of what comes."""
        self._leave_idle()
        self._answer, self._head_bytes, self._is_over = answer, 0, False
        # uvloop sends each piece by itself, and the engine would wake for the head alone.
        self._transport.write(head + body)

    def go_on(self) -> None:
        """There is room for more of the answer."""
        if not self._is_reading and self.is_open:
            self._is_reading = True
            self._transport.resume_reading()

    def drop(self) -> None:
        """Closes it, whatever waits on it."""
        self._leave_idle()
        self._answer = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.drop()  # nothing was asked
            return
        if not answer.http_status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._hand_over(answer)
            self._break_off(answer, f"it cannot be read: {type(error).__name__}")
            return
        if not answer.http_status and self._head_bytes > HEAD_BYTES_MAX:
            self._break_off(answer, "its head has no end")
            return
        self._hand_over(answer)

    def _hand_over(self, answer: EngineAnswer) -> None:
        """What came together goes on together."""
        if self._pieces:
            data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces.clear()
            # Whoever takes it may close the answer.
            if not answer.put(data) and not self._is_over and self.is_open:
                self._is_reading = False
                self._transport.pause_reading()
        if self._is_over and self._answer is answer:
            self._end(answer)

    def _end(self, answer: EngineAnswer) -> None:
        self._answer = None
        answer.end()
        # An engine that answered before it had read all may never read the rest.
        has_sent_all = not self._transport.get_write_buffer_size()
        if self._can_stay and self._has_length and has_sent_all and not self._says_more and self.is_open:
            self._idle.append(self)
            self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS_MAX, self.drop)
        else:
            self._transport.abort()

    def _break_off(self, answer: EngineAnswer, words: str) -> None:
        answer.break_off(AnswerBrokenError(words))
        self.drop()

    def _leave_idle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._idle.remove(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_idle()
        answer, self._answer = self._answer, None
        self._parser = None  # each knows the other, and both would stay for the garbage collector
        if answer is None:
            return
        if answer.http_status and not self._has_length and exc is None:
            answer.end()  # its end is the connection's
        else:
            answer.break_off(AnswerBrokenError("its connection ended"))

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._says_more = self._is_over
        self._content_type, self._has_length = "", False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._content_type = value.decode("latin-1")
        elif name in {b"content-length", b"transfer-encoding"}:
            self._has_length = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= _ANSWER_STATUS_MIN and self._answer is not None and not self._is_over:
            self._answer.begin(status, self._content_type)

    def on_body(self, body: bytes) -> None:
        if not self._is_over:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= _ANSWER_STATUS_MIN:
            self._is_over, self._can_stay = True, self._parser.should_keep_alive()


@lru_cache(maxsize=64)
def _place_of(url: str) -> SplitResult:
    return urlsplit(url)


def _head_of(url: str, path: str, headers: Mapping[str, str], body_bytes: int) -> bytes:
    place = _place_of(url)
    lines = [f"POST {place.path}{path} HTTP/1.1", f"host: {place.netloc}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join((*lines, f"content-length: {body_bytes}", "", "")).encode("latin-1")
