"""The load client: a process of its own that asks, times first tokens, checks every answer and reads the CPU clocks meanwhile.

It takes one command a line on its standard input and answers with one line each; the harness speaks to it through `LoadClient`. It checks
that all tokens of an answer came, in order, and says so after the clocks have stopped. It must not know which relay it measures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import httptools
import uvloop

from tests.benchmarks.answers import check_streamed, check_whole
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
    prompt,
)
from tests.benchmarks.processes import Child, CpuReading

_EVENT: Final = b"data: "


class Recorder:
    """Counts over all connections of one run, and takes the CPU readings at both ends of its window."""

    def __init__(self, load: Load, target: Target) -> None:
        self._load = load
        self._watched = tuple({os.getpid(), *target.own_process_ids, *(each for ids in target.process_ids.values() for each in ids)})
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
        self._event_count += data.count(_EVENT)
        if self._event_count >= self._open_at:
            self._open_at = sys.maxsize
            self.open_window()
        elif self._event_count >= self._close_at:
            self._close_at = sys.maxsize
            self.close_window()

    def result(self, first_token_ms: list[float], request_ms: list[float], delay_ms: list[float]) -> LoadResult:
        if self._opened is None or self._closed is None or self._closed[0].at_seconds <= self._opened[0].at_seconds:
            raise LoadFailedError("too little came to be measured")
        (before, events_before), (after, events_after) = self._opened, self._closed
        return LoadResult(
            first_token_ms=tuple(first_token_ms),
            request_ms=tuple(request_ms),
            delay_ms=tuple(delay_ms),
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
        self.pieces: list[tuple[float, bytes]] = []
        """When each part of the body came, by CLOCK_MONOTONIC."""

    async def ask(self, request: bytes) -> list[tuple[float, bytes]]:
        """The pieces of the answer's body; raises LoadFailedError for any status but 200 and for a connection that broke."""
        assert self._transport is not None
        self._reset()
        self._ended = self._loop.create_future()
        self._transport.write(request)
        await self._ended
        status = self._parser.get_status_code()
        if status != 200:
            body = b"".join(data for _, data in self.pieces)
            raise LoadFailedError(f"HTTP {status}: {body[:300].decode(errors='replace')}")
        return self.pieces

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not say that they are asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))  # the loop's own clock counts whole milliseconds
        self._recorder.count(data)

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
        "messages": [{"role": "user", "content": prompt(load)}],
        "max_tokens": load.token_count,
        "stream": load.streamed,
    }
    encoded = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nAuthorization: {target.authorization}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


@dataclass(frozen=True, slots=True)
class _Answer:
    asked_at_seconds: float
    ended_at_seconds: float
    pieces: list[tuple[float, bytes]]


async def _converse(load: Load, target: Target, connection: Connection, delay_seconds: float) -> list[_Answer]:
    """Asks one connection's requests, as long as there is time for another."""
    request = request_bytes(load, target)
    over_at_seconds = time.monotonic() + load.asking_seconds
    await asyncio.sleep(delay_seconds)
    answers: list[_Answer] = []
    while len(answers) < load.requests_per_connection and (not answers or time.monotonic() < over_at_seconds):
        asked_at_seconds = time.monotonic()
        pieces = await connection.ask(request)
        answers.append(_Answer(asked_at_seconds, time.monotonic(), pieces))
    return answers


def _measured(load: Load, recorder: Recorder, answers: list[_Answer]) -> LoadResult:
    """Checks every answer, now that the clocks have stopped; raises LoadFailedError for one that is not whole."""
    request_ms = [(answer.ended_at_seconds - answer.asked_at_seconds) * 1e3 for answer in answers]
    if not load.streamed:
        for answer in answers:
            check_whole(load, b"".join(data for _, data in answer.pieces))
        return recorder.result([], request_ms, [])
    tokens = [check_streamed(load, answer.pieces) for answer in answers]
    first_ms = [(came[0].came_at_seconds - answer.asked_at_seconds) * 1e3 for answer, came in zip(answers, tokens, strict=True)]
    delay_ms = [(token.came_at_seconds - token.sent_at_seconds) * 1e3 for came in tokens for token in came]
    return recorder.result(first_ms, request_ms, delay_ms)


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
    return _measured(load, recorder, answers)


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
