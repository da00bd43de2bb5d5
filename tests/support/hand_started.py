"""A llama.cpp server as its owner starts it: a plain process of its own, on a port, that knows nothing of Potluck."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "hand/tiny:1"
"""What it calls its model."""

_PROGRAM = """
import sys, time
import xllamacpp

model, name, port, key, slots, metrics = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = model, {name}
params.hostnames, params.port = ["127.0.0.1"], int(port)
params.n_parallel, params.n_ctx, params.n_batch, params.n_ubatch = int(slots), 2048, 64, 64
params.endpoint_metrics = metrics == "True"
params.offline, params.ui, params.verbosity = True, False, 1
if key:
    params.api_keys = [key]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(10_000)
"""


class HandStarted:
    """One such server."""

    def __init__(self, model: Path, port: int, key: str, slots: int, *, metrics: bool) -> None:
        self._key = key
        command = [sys.executable, "-c", _PROGRAM, str(model), NAME, str(port), key, str(slots), str(metrics)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().decode().strip()
        assert self.url.startswith("http://127.0.0.1:"), "it did not start"

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Its own answer, asked by its owner."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self.url + path, data=None if body is None else json.dumps(body).encode(), headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def hand_started(model: Path, port: int = 0, key: str = "", *, slots: int = 2, metrics: bool = False) -> Iterator[HandStarted]:
    """Runs while the block does."""
    server = HandStarted(model, port, key, slots, metrics=metrics)
    try:
        yield server
    finally:
        server.end()
