"""The open-loop load client: a process of its own that asks when the trace says so, however slow the answers are.

It takes one command a line on its standard input and answers with one line each; the harness speaks to it through `OpenClient`. Answers are
kept as bytes and looked at when the run is over, so that looking takes no time from sending. It must not know whom it asks.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Final, cast

import httptools
import uvloop

from tests.benchmarks.load import LoadFailedError
from tests.benchmarks.open_load import (
    ANSWER_TOKENS_MAX,
    Arrival,
    Asked,
    OpenLoad,
    OpenResult,
    OpenTarget,
    decode_command,
    decode_result,
    encode_command,
    encode_result,
    expected_text,
    prompt_of,
    trace,
)
from tests.benchmarks.processes import Child, cpu_seconds, machine_busy_seconds

HTTP_OK: Final = 200
_CONTENT: Final = (b'"content": "', b'"content":"')
_EMPTY: Final = (b'"content": ""', b'"content":""')


def tokens_in(data: bytes) -> int:
    """How many events in it carry text; an event that is cut in two counts with one of its halves, or not at all."""
    return sum(map(data.count, _CONTENT)) - sum(map(data.count, _EMPTY))


class _Connection(asyncio.Protocol):
    """One kept-alive connection, with one request on it at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._over: asyncio.Future[str] | None = None
        self.begin()

    def begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.pieces: list[bytes] = []
        self.status = 0
        self.token_count = 0
        self.first_token_at: float | None = None
        self.last_token_at = 0.0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> str:
        """Returns when the answer is over: why it broke off, or nothing."""
        assert self._transport is not None
        self.begin()
        self._over = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._over

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP: {error}")
            self.close()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)
        if self.status == HTTP_OK and (count := tokens_in(data)):
            self.token_count += count
            self.last_token_at = time.perf_counter()
            if self.first_token_at is None:
                self.first_token_at = self.last_token_at

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._end("")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the connection broke")

    def _end(self, failure: str) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(failure)


class _Run:
    """One run."""

    def __init__(self, load: OpenLoad, target: OpenTarget) -> None:
        self._load = load
        self._target = target
        self._idle: list[_Connection] = []
        self._asked: list[Asked] = []

    async def run(self) -> tuple[Asked, ...]:
        arrivals = trace(self._load, len(self._target.authorizations))
        draw = random.Random(self._load.seed + 1)
        requests = [request_bytes(arrival, self._target, draw) for arrival in arrivals]
        loop = asyncio.get_running_loop()
        began_at = time.perf_counter()
        tasks: set[asyncio.Task[None]] = set()
        for arrival, request in zip(arrivals, requests, strict=True):
            delay_seconds = began_at + arrival.at_seconds - time.perf_counter()
            if delay_seconds > 0:
                await asyncio.sleep(delay_seconds)
            late_seconds = max(0.0, time.perf_counter() - began_at - arrival.at_seconds)
            tasks.add(loop.create_task(self._ask(arrival, request, late_seconds)))
        ends_at = began_at + self._load.seconds + self._load.drain_seconds_max
        if tasks:
            _, unfinished = await asyncio.wait(tasks, timeout=max(0.0, ends_at - time.perf_counter()))
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        for connection in self._idle:
            connection.close()
        return tuple(sorted(self._asked, key=lambda asked: asked.at_seconds))

    async def _ask(self, arrival: Arrival, request: bytes, late_seconds: float) -> None:
        sent_at = time.perf_counter()
        connection: _Connection | None = None
        failure: str | None = None
        try:
            connection = await self._connection()
            failure = await connection.ask(request)
        except OSError as error:
            failure = f"cannot connect: {error}"
        finally:
            over_at = None if failure is None else time.perf_counter()
            self._asked.append(_asked(arrival, late_seconds, sent_at, over_at, connection, failure))
            if connection is not None:
                if failure == "" and connection.usable:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._target.host, self._target.port)
        return connection


def _asked(
    arrival: Arrival, late_seconds: float, sent_at: float, over_at: float | None, connection: _Connection | None, failure: str | None
) -> Asked:
    first_at = connection.first_token_at if connection is not None else None
    token_seconds = None
    if connection is not None and first_at is not None and connection.token_count > 1:
        token_seconds = (connection.last_token_at - first_at) / (connection.token_count - 1)
    status = connection.status if connection is not None else 0
    if failure is None:
        failure = "unfinished"
    elif not failure and connection is not None:
        failure = failure_of(arrival, status, b"".join(connection.pieces))
    return Asked(
        at_seconds=arrival.at_seconds,
        late_seconds=late_seconds,
        account=arrival.account,
        answer_tokens=arrival.answer_tokens,
        status=status,
        first_token_seconds=None if first_at is None else first_at - sent_at,
        over_seconds=None if over_at is None else over_at - sent_at,
        token_seconds=token_seconds,
        failure=failure,
    )


def failure_of(arrival: Arrival, status: int, body: bytes) -> str:
    """Why it is not the whole answer, every token once and in order; empty where it is."""
    if status != HTTP_OK:
        return f"HTTP {status}"
    try:
        text = streamed_text(body)
    except (LoadFailedError, ValueError, KeyError):
        return "broke off"
    return "" if text == expected_text(arrival.answer_tokens) else "wrong text"


def streamed_text(body: bytes) -> str:
    """The text of a streamed answer; raises LoadFailedError where it reports an error or does not end with `[DONE]`."""
    events = [line[6:].strip() for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise LoadFailedError(f"a stream ended without [DONE]: {body[-300:].decode(errors='replace')}")
    pieces = [choice["delta"].get("content") or "" for event in events[:-1] for choice in json.loads(event).get("choices", ())]
    return "".join(pieces)


def request_bytes(arrival: Arrival, target: OpenTarget, draw: random.Random) -> bytes:
    """The request, in one piece."""
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt_of(arrival, draw)}],
        "max_tokens": ANSWER_TOKENS_MAX,
        "stream": True,
        "service_tier": "flex",
    }
    encoded = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {target.host}:{target.port}\r\n"
        f"Authorization: {target.authorizations[arrival.account]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


async def run_load(load: OpenLoad, target: OpenTarget) -> OpenResult:
    """One run."""
    began_at, busy_before, own_before = time.monotonic(), machine_busy_seconds(), cpu_seconds(os.getpid()) or 0.0
    asked = await _Run(load, target).run()
    seconds = time.monotonic() - began_at
    busy = (machine_busy_seconds() - busy_before) / seconds / (os.cpu_count() or 1)
    return OpenResult(asked, min(1.0, busy), ((cpu_seconds(os.getpid()) or 0.0) - own_before) / seconds)


class OpenClient:
    """The harness's side of the client process.

    Args:
        log_file: takes what the process prints on its standard error.
    """

    def __init__(self, log_file: Path) -> None:
        self._child = Child([sys.executable, "-m", "tests.benchmarks.open_client"], log_file, pipe=True)

    def run(self, load: OpenLoad, target: OpenTarget) -> OpenResult:
        """One run against one target."""
        return decode_result(self._child.ask(encode_command(load, target)))

    def stop(self) -> None:
        self._child.stop()


def main() -> None:
    gc.disable()
    for line in sys.stdin:
        print(encode_result(uvloop.run(run_load(*decode_command(line)))), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
