"""Which programs on which machine: what a table of figures is worth little without.

Decides which of a peer's pins names it. It must not know what was measured.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Final

from tests.benchmarks.marks import FLOOR
from tests.benchmarks.peer_contenders import PINS, PeerUnavailableError, haproxy_program

_PACKAGES: Final = {
    "sglang-router": ("sglang_router", "sglang-router"),
    "vllm-router": ("vllm_router", "vllm-router"),
    "smg": ("smg", "smg"),
    "LiteLLM": ("litellm", "litellm"),
    "Ray Serve": ("ray_serve", "ray"),
    "Ray Serve, HAProxy": ("ray_serve", "ray"),
}
"""The list of pins of each peer, and the pin that is the peer itself."""


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of these contenders, of Potluck's own libraries, and of the machine."""
    found = {name: _contender_version(name) for name in names if name not in {"direct", "Potluck"}}
    ours = {f"Potluck's {package}": version(package) for package in ("grpcio", "ray", "uvicorn", "uvloop", "aiohttp")}
    return {
        **found,
        "Potluck": f"{version('potluck')} ({_commit()})",
        **ours,
        "Python": platform.python_version(),
        "kernel": platform.release(),
        "processor": _processor(),
    }


def _contender_version(name: str) -> str:
    if name == "aiohttp relay":
        return f"aiohttp {version('aiohttp')}"
    if name == FLOOR:
        return f"grpcio {version('grpcio')}"
    if name == "HAProxy":
        return _haproxy_version()
    pins, package = _PACKAGES[name]
    lines = (PINS / f"{pins}.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def _haproxy_version() -> str:
    try:
        program, variables = haproxy_program()
    except PeerUnavailableError:
        return "none"
    told = subprocess.run([str(program), "-v"], capture_output=True, text=True, env=variables, check=False).stdout
    return " ".join(told.split()[:3])


def _commit() -> str:
    """The commit of this checkout, with a + where it was changed since."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit or 'no checkout'}{'+' if git('status', '--porcelain') else ''}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
