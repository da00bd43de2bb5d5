"""The load client: a process of its own that asks, times first tokens, checks every answer and reads the CPU clocks meanwhile.

It takes one command a line on its standard input and answers with one line each; the harness speaks to it through `LoadClient`. It checks
that all tokens of an answer came, in order, and says so after the clocks have stopped. It must not know which relay it measures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Final, cast

import httptools
import uvloop

from tests.benchmarks.load import (
    Load,
    LoadFailedError,
    LoadResult,
    Target,
    decode_command,
    decode_result,
    encode_command,
    encode_failure,
    encode_result,
    expected_text,
)
from tests.benchmarks.processes import Child, CpuReading

_PROMPT: Final = "Tell me in plain words why a pot luck dinner feeds more people than any one cook could. " * 6
_FIRST_TOKEN: Final = re.compile(rb'"content": ?"[^"]')


class Recorder:
    """Counts over all connections of one run, and takes the CPU readings at both ends of its window."""

    def __init__(self, load: Load, target: Target) -> None:
        self._load = load
        self._watched = [process_id for ids in target.process_ids.values() for process_id in ids] + [os.getpid()]
        self._groups = target.process_ids
        self._event_count = 0
        self._open_at, self._close_at = load.steady_tokens if load.steady else (sys.maxsize, sys.maxsize)
        self._opened: tuple[CpuReading, int] | None = None
        self._closed: tuple[CpuReading, int] | None = None

    def open_window(self) -> None:
        self._opened = (CpuReading.take(self._watched), self._event_count)

    def close_window(self) -> None:
        self._closed = (CpuReading.take(self._watched), self._event_count)

    def count(self, data: bytes) -> None:
        """Counts the events in one piece. A few carry no token; in the middle of a run none of those."""
        self._event_count += data.count(b"data: ")
        if self._event_count >= self._open_at:
            self._open_at = sys.maxsize
            self.open_window()
        elif self._event_count >= self._close_at:
            self._close_at = sys.maxsize
            self.close_window()

    def result(self, first_token_ms: list[float], request_ms: list[float]) -> LoadResult:
        if self._opened is None or self._closed is None or self._closed[0].at_seconds <= self._opened[0].at_seconds:
            raise LoadFailedError("too little came to be measured")
        (before, events_before), (after, events_after) = self._opened, self._closed
        return LoadResult(
            first_token_ms=tuple(first_token_ms),
            request_ms=tuple(request_ms),
            window_seconds=after.at_seconds - before.at_seconds,
            window_token_count=events_after - events_before,
            window_request_count=0 if self._load.steady else len(request_ms),
            cpu_seconds={name: after.spent_since(before, ids) for name, ids in self._groups.items()},
            foreign_cpu_share=after.foreign_share_since(before, self._watched),
        )


class Connection(asyncio.Protocol):
    """One kept-alive HTTP connection that asks one request at a time."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self.first_token_at: float | None = None

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer; raises LoadFailedError for any status but 200 and for a connection that broke."""
        assert self._transport is not None
        self._reset()
        self._ended = self._loop.create_future()
        self._transport.write(request)
        await self._ended
        body = b"".join(self._pieces)
        status = self._parser.get_status_code()
        if status != 200:
            raise LoadFailedError(f"HTTP {status}: {body[:300].decode(errors='replace')}")
        return body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not say that they are asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._recorder.count(data)
        if self.first_token_at is None and _FIRST_TOKEN.search(b"".join(self._pieces)):
            self.first_token_at = time.perf_counter()  # the loop's own clock counts whole milliseconds

    def on_message_complete(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(LoadFailedError(f"the connection broke in the middle of an answer: {exc}"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def request_bytes(load: Load, target: Target) -> bytes:
    """The request, in one piece."""
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": load.token_count,
        "stream": load.streamed,
    }
    encoded = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nAuthorization: {target.authorization}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


def streamed_text(body: bytes) -> str:
    """The text of a streamed answer; raises LoadFailedError where it reports an error or does not end with `[DONE]`."""
    events = [line[6:].strip() for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise LoadFailedError(f"a stream ended without [DONE]: {body[-300:].decode(errors='replace')}")
    pieces = [choice["delta"].get("content") or "" for event in events[:-1] for choice in json.loads(event).get("choices", ())]
    return "".join(pieces)


def whole_text(body: bytes) -> str:
    """The text of an answer in one piece."""
    return str(json.loads(body)["choices"][0]["message"]["content"])


def check_answer(load: Load, body: bytes) -> None:
    """Raises LoadFailedError unless every token came, once and in order."""
    text = streamed_text(body) if load.streamed else whole_text(body)
    if text != expected_text(load.token_count):
        raise LoadFailedError(f"an answer of {load.token_count} tokens came as {len(text) // 2}, or not in order: {text[:60]!r}")


async def _converse(load: Load, target: Target, connection: Connection, delay_seconds: float) -> list[tuple[float, float, bytes]]:
    """Asks one connection's requests; first token (0 where not streamed) and whole time in milliseconds, and the body, of each."""
    request = request_bytes(load, target)
    await asyncio.sleep(delay_seconds)
    answers = []
    for _ in range(load.requests_per_connection):
        sent_at = time.perf_counter()
        body = await connection.ask(request)
        first_ms = (connection.first_token_at - sent_at) * 1000 if connection.first_token_at else 0.0
        answers.append((first_ms, (time.perf_counter() - sent_at) * 1000, body))
    return answers


async def run_load(load: Load, target: Target) -> LoadResult:
    """One run; raises LoadFailedError for any answer that is wrong, short or late."""
    loop = asyncio.get_running_loop()
    recorder = Recorder(load, target)
    connections: list[Connection] = []
    try:
        async with asyncio.timeout(load.limit_seconds):
            for _ in range(load.connection_count):
                _, connection = await loop.create_connection(lambda: Connection(recorder), target.host, target.port)
                connections.append(connection)
            if not load.steady:
                recorder.open_window()
            step_seconds = load.stagger_ms / 1000 / load.connection_count
            talks = [_converse(load, target, connection, index * step_seconds) for index, connection in enumerate(connections)]
            answers = [answer for talk in await asyncio.gather(*talks) for answer in talk]
            if not load.steady:
                recorder.close_window()
    except TimeoutError:
        raise LoadFailedError(f"the run was not over after {load.limit_seconds:.0f} s") from None
    except OSError as error:
        raise LoadFailedError(f"cannot reach {target.host}:{target.port}: {error}") from error
    finally:
        for connection in connections:
            connection.close()
    for _, _, body in answers:
        check_answer(load, body)
    first_token_ms = [first for first, _, _ in answers] if load.streamed else []
    return recorder.result(first_token_ms, [whole for _, whole, _ in answers])


class LoadClient:
    """The harness's side of the client process.

    Args:
        log_file: takes what the process prints on its standard error.
        cores: where it may run.
    """

    def __init__(self, log_file: Path, cores: frozenset[int]) -> None:
        self._child = Child([sys.executable, "-m", "tests.benchmarks.load_client"], log_file, cores=cores, pipe=True)

    def run(self, load: Load, target: Target) -> LoadResult:
        """One run against one target; raises LoadFailedError."""
        return decode_result(self._child.ask(encode_command(load, target)))

    def stop(self) -> None:
        self._child.stop()


def main() -> None:
    gc.disable()
    for line in sys.stdin:
        load, target = decode_command(line)
        try:
            answer = encode_result(uvloop.run(run_load(load, target)))
        except LoadFailedError as failure:
            answer = encode_failure(str(failure))
        print(answer, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
