"""The http port: uvicorn inside a loop that belongs to somebody else, with bounds on a connection before and after its requests.

Decides how the port is bound, secured and bounded. Its requests go to `http_routes`, each with the `http_exchange.Connection` by which
pieces of a stream are written past ASGI. It must not know what the routes do.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from potluck_coordinator.gateway.edges import BODY_SECONDS_MAX, STALL_SECONDS_MAX
from potluck_coordinator.gateway.http_exchange import CONNECTION_EXTENSION, Header
from potluck_coordinator.gateway.http_inference import KeyedRequests, Requests
from potluck_coordinator.gateway.http_routes import HttpRoutes
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.openai_errors import error_body
from potluck_coordinator.listening import bind_patiently
from potluck_coordinator.metrics import Metrics
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError

CONNECTIONS_MAX: Final = 4096
"""One more is closed as soon as it opens: each costs an open file and its buffers, whether it asks anything or not."""
HEAD_BYTES_MAX: Final = 64 * 1024
HEAD_SECONDS_MAX: Final = 15.0
"""From a connection's start, or a request's first byte, to the end of its headers."""
IDLE_SECONDS_MAX: Final = 75
"""An open connection may wait so long for its next request; longer than the proxies in front, so that they are the ones to close."""
UNREAD_BODY_BYTES_MAX: Final = 32 * 1024 * 1024
"""What a client may go on sending that nobody reads, as after it was refused: closing at once would lose it the refusal."""
BACKLOG: Final = 1024
"""Connections that the kernel holds while the loop is busy; clients beyond it are not refused but wait a second for their next try."""


class _Connection:
    """`http_exchange.Connection`. It does not know the protocol, which would keep both alive for the garbage collector to find."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow
        self._cycle: RequestResponseCycle | None = None
        self._on_lost: Callable[[], None] | None = None
        self._is_lost = False

    def serve(self, cycle: RequestResponseCycle) -> None:
        """The request as uvicorn has it, from the end of its head to the end of its answer."""
        self._cycle = cycle

    def end(self, *, lost: bool) -> None:
        """The answer is over, or the connection is."""
        self._cycle = None
        self._is_lost = self._is_lost or lost
        if lost and self._on_lost is not None:
            self._on_lost()

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        self._on_lost = on_lost
        if self._is_lost and on_lost is not None:
            on_lost()

    def abort(self) -> None:
        self._transport.abort()

    def keeps_up(self) -> bool:
        return not self._flow.write_paused and not self._transport.is_closing()

    def whole_body(self) -> bytes | None:
        cycle = self._cycle
        if cycle is None or cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        self._flow.resume_reading()  # otherwise a client that hangs up would not be noticed
        return body

    def write_now(self, data: bytes) -> None:
        # As uvicorn would, with a coroutine for each piece. uvloop raises where a connection is gone, asyncio does not.
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def begin_now(self, status: int, headers: Iterable[Header], first: bytes) -> bool:
        cycle = self._writable()
        if cycle is None:
            return False
        cycle.response_started, cycle.chunked_encoding = True, True
        head = _head(status, headers, cycle, b"transfer-encoding: chunked\r\n\r\n")
        # A piece of no bytes would be the end.
        self._transport.write(b"%b%x\r\n%b\r\n" % (head, len(first), first) if first else head)
        return True

    def answer_now(self, status: int, headers: Iterable[Header], body: bytes) -> bool:
        cycle = self._writable()
        if cycle is None:
            return False
        cycle.response_started = cycle.response_complete = True
        self._transport.write(_head(status, headers, cycle, b"\r\n") + body)
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()
        return True

    def _writable(self) -> RequestResponseCycle | None:
        """The request, where its answer can begin now and nothing that HTTP has for rarer cases is asked for."""
        cycle = self._cycle
        if cycle is None or cycle.response_started or cycle.waiting_for_100_continue or cycle.scope["method"] == "HEAD":
            return None
        return cycle if self.keeps_up() else None


def _head(status: int, headers: Iterable[Header], cycle: RequestResponseCycle, end: bytes) -> bytes:
    """The head of an answer, as uvicorn writes it. No value in it is a client's but the request id, which `request_ids` bounds."""
    lines, says_close = [STATUS_LINE[status]], False
    for name, value in (*cycle.default_headers, *headers):
        lines += (name, b": ", value, b"\r\n")
        says_close = says_close or name == b"connection"
    cycle.keep_alive = cycle.keep_alive and not says_close
    if not (cycle.keep_alive or says_close):
        lines.append(b"connection: close\r\n")
    lines.append(end)
    return b"".join(lines)


class _BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which has no bound of its own on headers, their size or their time, nor on the rest of a refused body.

    A request that comes before the answer to the last one is over is not served: the connection closes behind that answer, as HTTP allows.
    To keep it, reading would have to pause, and a client that hangs up meanwhile would not be noticed.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.is_last = False
        """It closes behind its next answer."""
        self._early = False
        self._reading_head = True
        self._message_ended = False
        self._head_bytes = 0
        self._unread_bytes = 0
        self._timer = self.loop.call_later(HEAD_SECONDS_MAX, transport.close)
        self._unread_timer: asyncio.TimerHandle | None = None
        self._served: _Connection | None = None
        if len(self.connections) > CONNECTIONS_MAX:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        super().connection_lost(exc)
        if self._served is not None:
            self._served.end(lost=True)

    def data_received(self, data: bytes) -> None:
        if self._early:
            self._count_unread(data)
            return
        self._message_ended = False
        super().data_received(data)
        self._go_on_waiting()
        # Data in which another request ended is not the head's alone, and is left uncounted.
        if self._reading_head and not self._message_ended:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
                self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._set_aside():
            return
        self._timer.cancel()
        self._timer = self.loop.call_later(HEAD_SECONDS_MAX, self.transport.close)
        self._reading_head, self._head_bytes, self._unread_bytes = True, 0, 0
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        self._served = _Connection(self.transport, self.flow)
        scope["extensions"] = {CONNECTION_EXTENSION: self._served}

    def on_headers_complete(self) -> None:
        if self._early:
            return
        self._timer.cancel()
        self._reading_head = False
        super().on_headers_complete()
        if self.is_last:
            self.cycle.keep_alive = False
        if self._served is not None:
            self._served.serve(self.cycle)

    def on_body(self, body: bytes) -> None:
        if self._early:
            return
        if self.cycle.response_complete:
            self._count_unread(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._early:
            return
        self._timer.cancel()
        self._message_ended = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._served is not None:
            self._served.end(lost=False)
        if self.cycle.response_complete and self.cycle.more_body:
            self._timer = self.loop.call_later(BODY_SECONDS_MAX, self.transport.close)
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        self._watch_unread(None)
        if self._early and not self.transport.is_closing():
            self._close_behind_the_answer()

    def _close_behind_the_answer(self) -> None:
        """Closed at once, with bytes of the client's unread, the kernel would throw the end of the answer away."""
        if not self.transport.can_write_eof():  # TLS has no half of a connection
            self.transport.close()
            return
        self.transport.write_eof()
        self._timer = self.loop.call_later(BODY_SECONDS_MAX, self.transport.close)

    def _watch_unread(self, before_bytes: int | None) -> None:
        """A client that takes nothing of a finished answer is gone. Even a closed connection would wait for it, answer and all."""
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes and unread_bytes == before_bytes:
            self.transport.abort()
        elif unread_bytes:
            self._unread_timer = self.loop.call_later(STALL_SECONDS_MAX, self._watch_unread, unread_bytes)

    def _set_aside(self) -> bool:
        """Has what begins here, and all behind it, dropped if it follows a request that is all there and not yet answered to the end."""
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self._early = True
        return self._early

    def _count_unread(self, data: bytes) -> None:
        self._unread_bytes += len(data)
        if self._unread_bytes > UNREAD_BODY_BYTES_MAX:
            # Nothing is lost with an early sender's answer that it does not read; a refusal still waits for its reader.
            self.transport.abort() if self._early else self.transport.close()

    def _go_on_waiting(self) -> None:
        """Bare line ends between two requests, which the parser skips, have ended uvicorn's time for an idle connection."""
        idle = self.cycle is not None and self.cycle.response_complete and not self.cycle.more_body and not self._reading_head
        if idle and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        """A request that is not HTTP, refused in the same shape as everything else."""
        if self._set_aside():
            return
        body = error_body(PotluckError(ErrorCode.INVALID_REQUEST, msg))
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % len(body) + body)
        self.transport.close()


class _EmbeddedServer(uvicorn.Server):
    """Leaves the process's signals to the process."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """Serves the http port.

    Args:
        requests: serves inference and lists models.
        keys: whose API key it is.
        connection_document: the JSON of `/pool/v1/connection`.
        metrics: counts, and is shown.
        clock: for durations.
        keyed: serves inference for whoever names an idempotency key.
        tls_certificate: PEM chain; None where a proxy in front does TLS or everything is on one machine.
        tls_key: its key.
    """

    def __init__(
        self,
        requests: Requests,
        keys: KeyCache,
        connection_document: bytes,
        metrics: Metrics,
        clock: Clock,
        *,
        keyed: KeyedRequests,
        tls_certificate: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self._routes = HttpRoutes(requests, keys, connection_document, metrics, clock, keyed=keyed)
        self._tls_certificate = tls_certificate
        self._tls_key = tls_key
        self._server: _EmbeddedServer | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int, *, shared: bool = False) -> int:
        """Serves on the port (0: any free one), beside other gateways of this machine if it is shared, and returns its number.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE if the address cannot be had within 10 s, naming the reason.
        """
        listener = await bind_patiently(host, port, "--http-port", shared=shared)
        listener.listen(BACKLOG)
        # Accepted connections inherit it; asyncio's own loop would not set it on them, for their sockets name no protocol.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server = _EmbeddedServer(self._config())
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http-server")
        while not self._server.started:
            if self._serving.done():
                listener.close()
                self._serving.result()
            await asyncio.sleep(0.005)
        return int(listener.getsockname()[1])

    def close_behind_answers(self) -> None:
        """Takes no new connections; those that stand close behind their next answer, which says so."""
        if self._server is None:
            return
        for server in self._server.servers:
            server.close()
        for connection in tuple(self._server.server_state.connections):
            connection.is_last = True  # type: ignore[union-attr]

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Takes no new connections and ends requests still running after the grace. A second call shortens the first one's."""
        if self._server is None or self._serving is None:
            return
        if self._server.should_exit:
            await asyncio.wait([self._serving], timeout=grace_seconds)
            self._server.force_exit = True
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_seconds))
        self._server.should_exit = True
        # Whoever waits may give up; the server goes on ending.
        await asyncio.shield(self._serving)
        self._server = self._serving = None

    def _config(self) -> uvicorn.Config:
        application: Any = self._routes
        return uvicorn.Config(
            application,
            http=_BoundedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            log_level="error",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS_MAX,
            backlog=BACKLOG,
            ssl_certfile=self._tls_certificate,
            ssl_keyfile=self._tls_key,
        )
