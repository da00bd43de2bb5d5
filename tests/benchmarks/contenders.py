"""The scripted engine, and what a contender is: a way from the client to the engines, running.

Decides the engine's script: stamped tokens, at the pace that the prompt asks for. It must not know what is measured.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tests.benchmarks.load import Target
from tests.benchmarks.processes import Child, descendants, free_port

MODEL: Final = "bench"
SLOT_COUNT: Final = 128
CONTEXT_LENGTH_TOKENS: Final = 131_072
"""Room for the long prompt, which counts by its bytes before an engine has seen it."""
ANSWER_TOKENS_MAX: Final = 8192
READY_SECONDS_MAX: Final = 90.0


class PeerUnavailableError(Exception):
    """A peer cannot be installed or started here; its row says why and the run goes on."""


@dataclass(slots=True)
class Contender:
    """One way from the client to the engine, running."""

    name: str
    url: str
    process_ids: Callable[[], Mapping[str, tuple[int, ...]]]
    """The processes to watch, by what they are; asked before each run."""
    relay_groups: tuple[str, ...] = ()
    """Which of them together stand between client and engine."""
    authorization: str = "Bearer none"
    children: list[Child] = field(default_factory=list)

    def target(self) -> Target:
        address = urlsplit(self.url)
        return Target(
            host=address.hostname or "127.0.0.1",
            port=address.port or 80,
            model=MODEL,
            authorization=self.authorization,
            process_ids=self.process_ids(),
            own_process_ids=descendants(os.getpid()),
        )

    def stop(self) -> None:
        for child in reversed(self.children):
            child.stop()


STAMPED_SCRIPT: Final = {"stamped": True, "pace_in_prompt": True, "token_count": ANSWER_TOKENS_MAX}
"""First token at once, as many as `max_tokens` asks for."""


def write_script(folder: Path, script: Mapping[str, object] = STAMPED_SCRIPT) -> Path:
    """The engine's model file."""
    path = folder / "model" / "script.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(script))
    return path


def start_engine(folder: Path, cores: frozenset[int], number: int = 0) -> Contender:
    """The engine itself, with nothing in between."""
    arguments = ["--alias", MODEL, "--context", str(CONTEXT_LENGTH_TOKENS), "--slots", str(SLOT_COUNT)]
    port = free_port()
    command = [sys.executable, "-m", "potluck_node.engines.scripted_server", "--model", str(write_script(folder)), *arguments]
    engine = Child([*command, "--port", str(port)], folder / f"engine-{number}.log", cores=cores)
    return ready(Contender("direct", f"http://127.0.0.1:{port}", lambda: {"engine": (engine.process_id,)}, children=[engine]))


def ready(contender: Contender) -> Contender:
    """The same once it answers; stopped where it does not, which raises RuntimeError."""
    try:
        wait_until_answers(contender)
    except BaseException:
        contender.stop()
        raise
    return contender


def wait_until_answers(contender: Contender) -> None:
    """Returns once a one-token request is answered; raises RuntimeError, with what the process printed, when it never is."""
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    headers = {"content-type": "application/json", "authorization": contender.authorization}
    request = urllib.request.Request(f"{contender.url}/v1/chat/completions", body, headers)
    deadline = time.monotonic() + READY_SECONDS_MAX
    reason = "it never answered"
    while time.monotonic() < deadline:
        for child in contender.children:
            child.check_alive()
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                response.read()
                return
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(error)
        time.sleep(0.25)
    logs = "\n".join(child.log_tail() for child in contender.children)
    raise RuntimeError(f"{contender.name} is not ready after {READY_SECONDS_MAX:.0f} s ({reason}):\n{logs}")
