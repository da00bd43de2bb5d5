"""A hub on loopback: as much of the Hugging Face hub as its own client asks for one model's repository.

Written after the requests that the client makes: GET /api/models/NAME/revision/REVISION?blobs=true, and GET /NAME/resolve/COMMIT/FILE.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 1_000
"""The real hub keeps files of over 10 MB by their hash; this one begins sooner."""


@dataclass
class HubServer:
    """What it has, and what it was asked. A file's content may be a size, for weights that nobody is to fetch."""

    repositories: dict[str, dict[str, bytes | int]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=lambda: {"license": "apache-2.0"})
    gated: bool | str = False
    requests: list[str] = field(default_factory=list)
    lying_bytes: bytes = b""
    """Sent after the end of every small file."""
    ranges: list[int] = field(default_factory=list)
    """How many first bytes of files were asked for."""
    ignores_ranges: bool = False
    status: int = 200
    error_code: str = ""
    """What it says of such a status in the header that its clients go by."""
    waiting: threading.Event | None = None
    """Files are sent once it is set; None: at once."""
    url: str = ""

    def describe(self, name: str) -> bytes:
        siblings = [self._sibling(path, content) for path, content in sorted(self.repositories[name].items())]
        document = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "createdAt": "2024-07-01T12:00:00.000Z",
            "gated": self.gated,
            "private": False,
            "tags": [],
            "downloads": 1,
            "likes": 0,
            "siblings": siblings,
            "cardData": self.card,
        }
        return json.dumps(document).encode()

    @staticmethod
    def _sibling(path: str, content: bytes | int) -> dict[str, Any]:
        size = content if isinstance(content, int) else len(content)
        sibling: dict[str, Any] = {"rfilename": path, "size": size, "blobId": "b" * 40}
        if size >= LARGE_BYTES:
            sha256 = hashlib.sha256(b"%d" % content if isinstance(content, int) else content).hexdigest()
            sibling["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
        return sibling


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests for `hub`."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.hub.requests.append(self.path)
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        if self.hub.status != 200:
            self._reply(self.hub.status, b"{}", {"X-Error-Code": self.hub.error_code} if self.hub.error_code else None)
        elif path[:2] == ["api", "models"] and len(path) == 6 and path[4] == "revision":
            self._describe("/".join(path[2:4]), path[5], parse_qs(parts.query))
        elif len(path) > 4 and path[2] == "resolve":
            self._send("/".join(path[:2]), path[3], "/".join(path[4:]))
        else:
            self._reply(404, b"{}")

    def _describe(self, name: str, revision: str, query: dict[str, list[str]]) -> None:
        if name not in self.hub.repositories:
            self._reply(401, b'{"error": "Invalid username or password."}')
        elif revision not in {"main", COMMIT}:
            self._reply(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            assert query.get("blobs") in (["true"], ["True"]), query
            self._reply(200, self.hub.describe(name))

    def _send(self, name: str, revision: str, file: str) -> None:
        if self.hub.waiting is not None:
            self.hub.waiting.wait(30)
        content = self.hub.repositories.get(name, {}).get(file)
        if revision != COMMIT or not isinstance(content, bytes):
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            wanted = self.headers.get("Range")
            if wanted is None or self.hub.ignores_ranges:
                self._reply(200, content + self.hub.lying_bytes)
                return
            last = int(wanted.removeprefix("bytes=0-"))
            self.hub.ranges.append(last + 1)
            part = content[: last + 1]
            self._reply(206, part, {"Content-Range": f"bytes 0-{len(part) - 1}/{len(content)}"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Serves until the block ends."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
