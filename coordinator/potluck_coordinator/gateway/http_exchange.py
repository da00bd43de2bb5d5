"""One HTTP request and its answer. Where its client keeps up, `http_server` writes at once; the rest goes over ASGI.

Decides how a body is read within bounds, how an answer, a stream or a failure is written, and when a client counts as gone. It must not
know routes, models or money.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any, Final, Protocol, TypeAlias

from potluck_coordinator.gateway.edges import BODY_SECONDS_MAX, STALL_SECONDS_MAX
from potluck_coordinator.gateway.openai_errors import error_event, http_error
from potluck_coordinator.gateway.openai_request import BODY_BYTES_MAX, too_large
from potluck_coordinator.gateway.request_ids import request_id_of
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import REQUEST_ID

CLIENT_GONE_STATUS: Final = 499
CONNECTION_EXTENSION: Final = "potluck.connection"
"""Where the server leaves the `Connection` in the scope."""

_STREAM_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Otherwise nginx collects the answer before it hands it on.
    (b"x-accel-buffering", b"no"),
)

Header: TypeAlias = tuple[bytes, bytes]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class ClientGoneError(Exception):
    """Whoever asked has hung up."""


class Connection(Protocol):
    """What ASGI has no words for; its answer under way is the exchange's."""

    def abort(self) -> None:
        """Drops the connection, with whatever waits in it."""

    def keeps_up(self) -> bool:
        """Whether it would take more bytes now."""

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        """Calls that once when the client hangs up, at once where it has; None: nobody is to be called any more."""

    def whole_body(self) -> bytes | None:
        """The request's body, taken from ASGI; None where it is not all there yet."""

    def write_now(self, data: bytes) -> None:
        """Writes a piece in the middle of a stream, nothing awaited."""

    def begin_now(self, status: int, headers: Iterable[Header], first: bytes) -> bool:
        """Writes head and first piece of a stream at once; False, and nothing done, where ASGI has to."""

    def answer_now(self, status: int, headers: Iterable[Header], body: bytes) -> bool:
        """The same of an answer in one piece, which is then over."""


class Exchange:
    """What a route reads from and writes to.

    Args:
        scope: ASGI's description of the request.
        receive: ASGI's.
        send: ASGI's.
        clock: for durations.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send, clock: Clock) -> None:
        self._receive = receive
        self._send = send
        self._clock = clock
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._connection: Connection = scope["extensions"][CONNECTION_EXTENSION]
        self._sending = False
        self._piece_count = 0
        self._last_on_connection = False
        self._working: asyncio.Task[Any] | None = None
        """Whoever does what the client waits for."""
        self._looking: asyncio.TimerHandle
        """When it is next seen whether the client still reads."""
        self._stalled_at_piece = -1
        self._is_gone = False
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.started_at = clock.monotonic_seconds()
        self.request_id = request_id_of(self.header(REQUEST_ID.encode()))
        self.status = 0
        """0 until an answer has begun."""
        self.failure: ErrorCode | None = None
        self.streaming = False
        self.sent_bytes = 0
        self.first_byte_seconds: float | None = None
        """From arrival to the answer's first byte."""
        self.more_headers: Callable[[], Iterable[Header]] = tuple
        """Asked for when an answer or a refusal begins, whatever it is."""

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return self._clock.monotonic_seconds() - self.started_at

    def header(self, name: bytes) -> str | None:
        """A header of the request, by lower-case name."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def read_body(self) -> bytes:
        """The whole body.

        Raises:
            PotluckError: REQUEST_TOO_LARGE as soon as that is known; INVALID_REQUEST for a body that does not arrive in time.
            ClientGoneError: the client hung up before it was all there.
        """
        declared = self._headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
            raise too_large()
        if (whole := self._connection.whole_body()) is not None:
            if len(whole) > BODY_BYTES_MAX:
                raise too_large()
            return whole
        pieces: list[bytes] = []
        size_bytes = 0
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    pieces.append(message.get("body", b""))
                    size_bytes += len(pieces[-1])
                    if size_bytes > BODY_BYTES_MAX:
                        raise too_large()
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            # The rest may never come, and until it has, the connection is good for no other request.
            self._last_on_connection = True
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"The request body did not arrive within {BODY_SECONDS_MAX:.0f} s.") from None

    async def while_awaited(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the work, which writes the answer. For use once the body is read.

        Raises:
            ClientGoneError: the client has hung up, or has stopped reading for `STALL_SECONDS_MAX`; the work was cancelled.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._working, self._stalled_at_piece = task, -1
        self._looking = loop.call_later(STALL_SECONDS_MAX, self._look)
        # Not before the work waits for the first time: a task cannot cancel itself.
        watching = loop.call_soon(self._connection.watch, self._leave)
        try:
            await work
        except asyncio.CancelledError:
            if self._is_gone and task.uncancel() == 0:
                raise ClientGoneError from None
            raise
        finally:
            self._looking.cancel()
            watching.cancel()
            self._connection.watch(None)
            self._working = None

    def _leave(self) -> None:
        if self._working is not None and not self._is_gone:
            self._is_gone = True
            self._working.cancel()

    def _look(self) -> None:
        """Whether the client has taken anything since the last time."""
        if self._sending and self._stalled_at_piece == self._piece_count:
            self._leave()
            return
        self._stalled_at_piece = self._piece_count if self._sending else -1
        self._looking = asyncio.get_running_loop().call_later(STALL_SECONDS_MAX, self._look)

    def let_go(self) -> None:
        """The request is over. What asked for headers knows this exchange, and both would stay for the garbage collector."""
        self.more_headers = tuple

    async def reply(self, status: int, content_type: bytes, body: bytes, headers: Iterable[Header] = ()) -> None:
        """The whole answer at once."""
        length = b"%d" % len(body)
        await self._send_whole(status, ((b"content-type", content_type), (b"content-length", length), *headers), body)

    async def reply_json(self, body: bytes, headers: Iterable[Header] = ()) -> None:
        """A good answer that is one JSON document."""
        await self.reply(200, b"application/json", body, headers)

    async def begin_stream(self, first: bytes, headers: Iterable[Header] = ()) -> None:
        """The head of a stream of server-sent events, with the first of them."""
        self.streaming = True
        head = self._head(200, (*_STREAM_HEADERS, *headers))
        if self._connection.begin_now(200, head, first):
            self.first_byte_seconds = self.seconds
            self._piece_count += 1
            self.sent_bytes += len(first)
            return
        await self._send({"type": "http.response.start", "status": 200, "headers": head})
        await self.send_piece(first)

    async def send_piece(self, data: bytes, *, more: bool = True) -> None:
        """The next part of the answer's body, or its last; waits until the connection takes it."""
        self._sending = True
        if self.first_byte_seconds is None:
            self.first_byte_seconds = self.seconds
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._sending = False
        self._piece_count += 1
        self.sent_bytes += len(data)

    def send_now(self, data: bytes) -> bool:
        """As `send_piece` in the middle of a stream, but nothing is awaited; whether the connection would take more behind it.

        May be called once before that is known: it costs no more than this piece's memory.
        """
        self._connection.write_now(data)
        self.sent_bytes += len(data)
        return self._connection.keeps_up()

    async def fail(self, error: PotluckError, headers: Iterable[Header] = (), *, billed: bool = False) -> None:
        """The error answer; in a stream that has begun, the event that says so, with no `[DONE]` behind it."""
        self.failure = error.code
        if self.streaming:
            await self.send_piece(error_event(error), more=False)
            return
        answer = http_error(error, billed=billed)
        await self._send_whole(answer.status, (*answer.headers, (b"content-length", b"%d" % len(answer.body)), *headers), answer.body)

    async def hang_up(self) -> None:
        """Drops the connection with whatever still waits in it: nobody reads it."""
        self.failure = ErrorCode.CANCELLED
        self.status = CLIENT_GONE_STATUS
        self._connection.abort()
        await asyncio.sleep(0)  # the connection's end is told in the loop's next turn

    async def _send_whole(self, status: int, headers: Iterable[Header], body: bytes) -> None:
        """Head and body; a client that takes nothing of what it got before, as one that pipelines may, is dropped."""
        head = self._head(status, headers)
        if self._connection.answer_now(status, head, body):
            self.first_byte_seconds = self.seconds
            self.sent_bytes += len(body)
            return
        try:
            async with asyncio.timeout(STALL_SECONDS_MAX):
                await self._send({"type": "http.response.start", "status": status, "headers": head})
                await self.send_piece(body, more=False)
        except TimeoutError:
            await self.hang_up()

    def _head(self, status: int, headers: Iterable[Header]) -> list[Header]:
        self.status = status
        common = (
            (REQUEST_ID.encode(), self.request_id.encode()),
            (b"openai-processing-ms", b"%d" % round(self.seconds * 1000)),
        )
        close = ((b"connection", b"close"),) if self._last_on_connection else ()
        return [*headers, *common, *self.more_headers(), *close]
