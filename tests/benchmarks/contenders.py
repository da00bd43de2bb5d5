"""The scripted engine and the peers: how each is installed, started and asked, and which of its processes count.

Decides the peers' configuration, each at its best case: one worker, no database, no master key, logging off. Each lives in an environment
of its own below `.bench/`, made from pinned versions. It must not know what is measured.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tests.benchmarks.load import ANSWER_TOKENS, Target
from tests.benchmarks.processes import Child, free_port

ROOT: Final = Path(__file__).resolve().parents[2]
ENVIRONMENTS: Final = ROOT / ".bench"
MODEL: Final = "bench"
SLOT_COUNT: Final = 128
CONTEXT_LENGTH_TOKENS: Final = 8192
INTER_TOKEN_MS: Final = 12
INSTALL_SECONDS_MAX: Final = 420.0
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
        )

    def stop(self) -> None:
        for child in reversed(self.children):
            child.stop()


PACED_SCRIPT: Final = {"tokens": list(ANSWER_TOKENS), "token_count": CONTEXT_LENGTH_TOKENS, "inter_token_ms": INTER_TOKEN_MS}
"""First token at once, then one each 12 ms, as many as `max_tokens` asks for."""


def write_script(folder: Path, script: Mapping[str, object] = PACED_SCRIPT) -> Path:
    """The engine's model file."""
    path = folder / "model" / "script.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(script))
    return path


def start_direct(folder: Path, cores: frozenset[int]) -> Contender:
    """The engine itself, with nothing in between."""
    arguments = ["--alias", MODEL, "--context", str(CONTEXT_LENGTH_TOKENS), "--slots", str(SLOT_COUNT)]
    port = free_port()
    command = [sys.executable, "-m", "potluck_node.engines.scripted_server", "--model", str(write_script(folder)), *arguments]
    engine = Child([*command, "--port", str(port)], folder / "engine.log", cores=cores)
    contender = Contender("direct", f"http://127.0.0.1:{port}", lambda: {"engine": (engine.process_id,)}, children=[engine])
    return _ready(contender)


def start_sglang_router(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """sglang-router in front of the engines."""
    python = peer_environment("sglang_router")
    port = free_port()
    command = [str(python), "-m", "sglang_router.launch_router", "--worker-urls", *engine_urls, "--policy", "cache_aware"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return _peer_ready("sglang-router", Child(command, folder / "sglang_router.log", cores=cores), port)


def start_litellm(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """The LiteLLM proxy in front of the engines."""
    python = peer_environment("litellm")
    port = free_port()
    routes = [{"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"} for url in engine_urls]
    models = [{"model_name": MODEL, "litellm_params": route} for route in routes]
    configuration = folder / "litellm.yaml"
    configuration.write_text(json.dumps({"model_list": models}))  # JSON is YAML
    command = [str(python.with_name("litellm")), "--config", str(configuration)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    environment = {
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
    }
    return _peer_ready("LiteLLM", Child(command, folder / "litellm.log", environment=environment, cores=cores), port)


def _peer_ready(name: str, child: Child, port: int) -> Contender:
    contender = Contender(name, f"http://127.0.0.1:{port}", lambda: {"relay": child.family}, ("relay",), children=[child])
    try:
        return _ready(contender)
    except RuntimeError as error:
        raise PeerUnavailableError(f"does not start: {error}") from error


def peer_environment(name: str) -> Path:
    """The Python of a peer's own environment, made on the first call; raises PeerUnavailableError."""
    pins = Path(__file__).with_name("peers") / f"{name}.txt"
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    seal = folder / "pins.sha256"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    if python.exists() and seal.exists() and seal.read_text() == digest:
        return python
    print(f"installing {name} into .bench/{name} (once)", file=sys.stderr, flush=True)
    _install_step([sys.executable, "-m", "venv", "--clear", str(folder)])
    _install_step([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(pins)])
    seal.write_text(digest)
    return python


def _install_step(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailableError(f"cannot be installed: {error}") from error
    if done.returncode != 0:
        last_lines = " / ".join(done.stderr.strip().splitlines()[-2:])
        raise PeerUnavailableError(f"cannot be installed: {last_lines}")


def _ready(contender: Contender) -> Contender:
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
