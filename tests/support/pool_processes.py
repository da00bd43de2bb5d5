"""A pool as its people start it: `potluck coordinator serve` and `potluck node join/run` as processes, with a scripted engine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from potluck import Client
from potluck_protocol.values import EngineState
from tests.support.coordinator_process import CoordinatorProcess, wait_until
from tests.support.tiny_gguf import write_tiny_gguf

MODEL = "scripted"
LLAMACPP_MODEL = "tiny"
SLOT_COUNT = 8
SCRIPT = {"tokens": [f" {number}" for number in range(100)], "token_count": 400, "inter_token_ms": 10}
"""Four seconds of counting: long enough to break something in the middle."""


def write_catalogue(
    folder: Path, script: dict[str, Any] | None = None, *, with_llamacpp: bool = False, llamacpp_context_tokens: int = 256
) -> Path:
    """A catalogue whose model is the script, and, if asked for, a tiny real one for llama.cpp beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "scripted.json"
    model.write_text(json.dumps(SCRIPT if script is None else script))
    entries = [catalogue_entry(MODEL, model, "scripted", 4096, SLOT_COUNT)]
    if with_llamacpp:
        entries.append(catalogue_entry(LLAMACPP_MODEL, write_tiny_gguf(folder / "tiny.gguf"), "llamacpp", llamacpp_context_tokens, 2))
    catalogue = folder / "catalogue.toml"
    catalogue.write_text("\n".join(entries))
    return catalogue


def catalogue_entry(model_id: str, model: Path, engine_kind: str, context_length_tokens: int, slot_count: int) -> str:
    return f"""
[[model]]
model_id = "{model_id}"
source = "path:{model.parent}"
file_name = "{model.name}"
sha256 = "{hashlib.sha256(model.read_bytes()).hexdigest()}"
size_bytes = {model.stat().st_size}
engine_kind = "{engine_kind}"
context_length_tokens = {context_length_tokens}
slot_count = {slot_count}
prompt_price_micro_credits = 1
completion_price_micro_credits = 4
licence = "Apache-2.0"
endpoints = ["/v1/chat/completions", "/v1/completions"]
created_at_unix_seconds = 1
"""


class NodeProcess:
    """`potluck node join`, then `potluck node run`.

    Args:
        folder: for its state, cache and log.
        invite: spent once.
        wrap: what stands before the command that runs a Python module, and becomes it; a namespace's tests put `nsenter` there.
        module: what `run` is run with; tests of faults bring their own entry.
    """

    def __init__(self, folder: Path, invite: str, wrap: tuple[str, ...] = (), module: str = "potluck") -> None:
        self.folder = folder
        self.log_file = folder / "node.log"
        self._command = (*wrap, sys.executable, "-m", module, "node")
        folder.mkdir(parents=True)
        environment = self._environment()
        joined = subprocess.run(
            [*wrap, sys.executable, "-m", "potluck", "node", "join", "-", "--name", folder.name, "--serve"],
            input=invite,
            text=True,
            capture_output=True,
            env=environment,
            timeout=60,
            check=False,
        )
        assert joined.returncode == 0, joined.stdout + joined.stderr
        self.process = self._run(environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)

    def start_again(self) -> None:
        """After its process has ended."""
        self.process.wait(20)
        self.process = self._run(self._environment())

    @property
    def node_id(self) -> str:
        return json.loads((self.folder / "state" / "node.json").read_text())["node_id"]

    def agent(self) -> psutil.Process:
        """The agent itself: whatever wraps it has become it."""
        return psutil.Process(self.process.pid)

    def log(self) -> str:
        return self.log_file.read_text()

    def status_words(self) -> str:
        """`potluck node status`."""
        shown = subprocess.run(
            [sys.executable, "-m", "potluck", "node", "status"],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return shown.stdout

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "POTLUCK_NODE_STATE_DIR": str(self.folder / "state"),
            "POTLUCK_NODE_CACHE_DIR": str(self.folder / "cache"),
            "POTLUCK_NODE_MODELS_ALLOWED": f"{MODEL},{LLAMACPP_MODEL}",
            "POTLUCK_NODE_LOG_FORMAT": "json",
            "POTLUCK_NODE_SCRIPTED_ENGINE": "true",
            "XDG_CONFIG_HOME": str(self.folder / "config"),
        }

    def _run(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with self.log_file.open("ab") as log:
            return subprocess.Popen([*self._command, "run"], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)


class Pool:
    """A coordinator with its nodes; `url` and `api_key` are the operator's."""

    def __init__(self, folder: Path, coordinator: CoordinatorProcess, nodes: list[NodeProcess]) -> None:
        self.folder = folder
        self.coordinator = coordinator
        self.nodes = nodes

    @property
    def url(self) -> str:
        return self.coordinator.operator()["url"]

    @property
    def api_key(self) -> str:
        return self.coordinator.operator()["api_key"]

    def client(self) -> Client:
        return Client(self.url, api_key=self.api_key)

    def connected_count(self, model_id: str = MODEL) -> int:
        """Nodes with a link and a ready engine, as both see it: the gateway, which could place a request there, and the directory."""
        with self.client() as client:
            placeable = sum(model.ready_replica_count for model in client.models() if model.model_id == model_id)
            listed = sum(
                1
                for node in client.nodes()
                if node.connection == "connected"
                and any(engine.model_id == model_id and engine.state is EngineState.READY for engine in node.engines)
            )
            return min(placeable, listed)

    def wait_connected(self, model_id: str = MODEL, seconds_max: float = 60.0) -> float:
        """Seconds until every node serves."""
        started = time.monotonic()
        while time.monotonic() - started < seconds_max:
            try:
                if self.connected_count(model_id) == len(self.nodes):
                    return time.monotonic() - started
            except Exception:  # noqa: BLE001 - a coordinator that restarts refuses in many ways; the time limit is the judge
                pass
            time.sleep(0.1)
        logs = "\n".join(node.log() for node in self.nodes)
        raise AssertionError(f"not every node serves after {seconds_max} s\n{self.coordinator.log()}\n{logs}")

    def stream(self, *, idempotency_key: str | None = None, **fields: Any) -> ChatStream:
        """A chat answer on its way, event by event; the fields go into the request's body."""
        return ChatStream(self.url, self.api_key, fields, idempotency_key)


class ChatStream:
    """One streamed chat over HTTP, with nothing between the test and the bytes."""

    def __init__(self, url: str, api_key: str, fields: dict[str, Any], idempotency_key: str | None = None) -> None:
        body = {"model": MODEL, "stream": True, "max_tokens": 400, "messages": [{"role": "user", "content": "count"}], **fields}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"authorization": f"Bearer {api_key}", "content-type": "application/json"},
        )
        if idempotency_key is not None:
            request.add_header("idempotency-key", idempotency_key)
        self.response = urllib.request.urlopen(request, timeout=60)
        self.node_id = self.response.headers["x-potluck-node"]
        self._unread = b""
        self.token_count = 0
        self.done = False
        self.error: dict[str, Any] | None = None

    def events(self) -> Iterator[str]:
        """The payloads, as they come; what they say is counted on the way. Raises IncompleteRead where the connection was cut."""
        # Not line by line: there `http.client` takes a cut connection for the end.
        while data := self.response.read1(65536):
            self._unread += data
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                if line.startswith(b"data: "):
                    payload = line[6:].strip().decode()
                    self._take(payload)
                    yield payload

    def read_tokens(self, count: int) -> None:
        """Reads until so many tokens have come."""
        for _ in self.events():
            if self.token_count >= count:
                return
        raise AssertionError(f"the answer ended after {self.token_count} tokens: {self.error}")

    def read_to_end(self) -> None:
        for _ in self.events():
            pass

    def _take(self, payload: str) -> None:
        if payload == "[DONE]":
            self.done = True
            return
        event = json.loads(payload)
        self.error = event.get("error", self.error)
        self.token_count += sum(1 for choice in event.get("choices", ()) if choice.get("delta", {}).get("content"))


@contextmanager
def running_pool(
    folder: Path,
    node_count: int = 1,
    script: dict[str, Any] | None = None,
    node_module: str = "potluck",
    *,
    with_llamacpp: bool = False,
    llamacpp_context_tokens: int = 256,
) -> Iterator[Pool]:
    """Starts a coordinator and its nodes, waits until all serve, and stops everything."""
    catalogue = write_catalogue(folder / "models", script, with_llamacpp=with_llamacpp, llamacpp_context_tokens=llamacpp_context_tokens)
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue)))
        coordinator.wait_ready()
        pool = Pool(folder, coordinator, [])
        for number in range(node_count):
            pool.nodes.append(stack.enter_context(NodeProcess(folder / f"node-{number}", new_invite(pool), module=node_module)))
        pool.wait_connected()
        if with_llamacpp:
            pool.wait_connected(LLAMACPP_MODEL)
        yield pool


def command(pool: Pool, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`potluck …` as the operator types it on the coordinator's machine."""
    return subprocess.run(
        [sys.executable, "-m", "potluck", *arguments],
        env={**os.environ, "POTLUCK_COORDINATOR_DATA_DIR": str(pool.coordinator.data_dir)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def audit(pool: Pool) -> tuple[str, ...]:
    """What `potluck audit` finds; nothing when the books balance."""
    done = command(pool, "audit", "--json")
    findings: list[str] = json.loads(done.stdout)["findings"]
    assert (done.returncode == 0) == (not findings), done.stdout + done.stderr
    return tuple(findings)


def new_invite(pool: Pool) -> str:
    """From the command that operators use."""
    made = command(pool, "tokens", "create")
    assert made.returncode == 0, made.stdout + made.stderr
    return next(word for word in made.stdout.split() if word.startswith("potluck1."))


def new_owner(pool: Pool, name: str) -> tuple[str, str]:
    """A person of that name: a key, and an invite for a node."""
    account_id = json.loads(command(pool, "accounts", "create", name, "--json").stdout)["account_id"]
    key = json.loads(command(pool, "keys", "create", "--account", account_id, "--json").stdout)["api_key"]
    return key, json.loads(command(pool, "tokens", "create", "--account", account_id, "--json").stdout)["invite"]


__all__ = [
    "MODEL",
    "SLOT_COUNT",
    "ChatStream",
    "NodeProcess",
    "Pool",
    "audit",
    "catalogue_entry",
    "command",
    "new_invite",
    "new_owner",
    "running_pool",
    "wait_until",
    "write_catalogue",
]
