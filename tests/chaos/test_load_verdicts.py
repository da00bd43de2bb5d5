"""Whether the load of `coordinator_loss` tells an answer that broke from one that only stopped, and both from none that began."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.chaos import coordinator_loss
from tests.chaos.coordinator_loss import Load
from tests.support.coordinator_process import wait_until
from tests.support.pool_processes import ChatStream

TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"code":"node_lost"}}\n\n'


class Handler(BaseHTTPRequestHandler):
    """Answers with `content` in chunks, and ends the answer as HTTP asks for unless it is cut."""

    protocol_version = "HTTP/1.1"
    status = 200
    retry_after = ""
    content: tuple[bytes, ...] = ()
    cut = False

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        if self.retry_after:
            self.send_header("retry-after", self.retry_after)
        self.send_header("transfer-encoding", "chunked")
        self.send_header("x-potluck-node", "n")
        self.end_headers()
        for piece in self.content:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if not self.cut:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class calls it so
        del format, arguments


class OneServer:
    """As much of a pool as the load needs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stream(self) -> ChatStream:
        return ChatStream(self.url, "key", {})


@pytest.fixture
def server() -> Iterator[OneServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield OneServer(f"http://127.0.0.1:{http.server_port}")
        http.shutdown()
        thread.join(5)


@pytest.mark.parametrize(
    ("content", "cut", "complete", "silent"),
    [
        ((TOKEN, TOKEN[:9], TOKEN[9:] + DONE), False, True, False),
        ((TOKEN, ERROR), False, False, False),
        ((TOKEN,), True, False, False),
        ((TOKEN,), False, False, True),
        ((), False, False, True),
    ],
    ids=["whole", "an error", "a cut connection", "just ended", "nothing at all"],
)
def test_an_answer_that_only_stops_is_told_from_one_that_breaks(
    server: OneServer, monkeypatch: pytest.MonkeyPatch, content: tuple[bytes, ...], cut: bool, complete: bool, silent: bool
) -> None:
    monkeypatch.setattr(Handler, "content", content)
    monkeypatch.setattr(Handler, "cut", cut)
    load = Load(server)  # type: ignore[arg-type]
    assert load.ask_once() == (complete, None)
    assert (load.complete, load.broken, bool(load.silent_ends)) == (complete, not complete, silent)


@pytest.mark.parametrize(
    ("status", "retry_after", "told"),
    [(429, "2", 2.0), (503, "1", 1.0), (429, "", None), (503, "", None), (500, "1", None)],
    ids=["too many", "away", "too many for good", "away for good", "an error"],
)
def test_who_is_told_when_to_come_again_has_lost_no_answer(
    server: OneServer, monkeypatch: pytest.MonkeyPatch, status: int, retry_after: str, told: float | None
) -> None:
    monkeypatch.setattr(Handler, "status", status)
    monkeypatch.setattr(Handler, "retry_after", retry_after)
    load = Load(server)  # type: ignore[arg-type]
    assert load.ask_once() == (False, told)
    assert (load.complete, load.broken, load.refused) == (0, int(told is None), int(told is not None))


def test_who_is_told_so_for_too_long_has(server: OneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "status", 429)
    monkeypatch.setattr(Handler, "retry_after", "0")
    monkeypatch.setattr(coordinator_loss, "REFUSED_SECONDS_MAX", 0.2)
    with Load(server) as load:  # type: ignore[arg-type]
        wait_until(lambda: load.broken > 0, 20, "the load has had enough")
    assert load.failures["refused for too long"] == load.broken
    assert load.refused > load.broken
