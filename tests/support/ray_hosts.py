"""A Ray cluster of two hosts on one machine, as an operator starts one: `ray start` in each of two network namespaces, with a token."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from tests.support.coordinator_process import wait_gone
from tests.support.namespaces import Host, two_hosts

RAY_PORT = 6379
"""In a namespace of its own: nobody else has it."""
START_SECONDS_MAX = 45.0
START_TRIES_MAX = 2
"""A second host was seen to hang while it joined, once, and nothing was printed. An operator would try again, too."""
COMMON = ("--num-cpus=0", "--block", "--disable-usage-stats", "--object-store-memory=83886080")


@contextmanager
def ray_on_two_hosts() -> Iterator[tuple[Host, Host, str, dict[str, str]]]:
    """The hosts, the first of which has the cluster's head; its address; and the environment of whoever joins it."""
    # A short path, for those of Ray's sockets are bounded. Each host has one of its own there, as two machines have: by the files in it Ray
    # tells which of its nodes is this machine's.
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))
        own, other = stack.enter_context(two_hosts())
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_worker_niceness": "0",
            "RAY_memory_monitor_refresh_ms": "0",
        }
        ray_address = f"{own.address}:{RAY_PORT}"
        head = ("--head", f"--port={RAY_PORT}", "--include-dashboard=false", f"--temp-dir={folder}/r")
        for host, flags in ((own, head), (other, (f"--address={ray_address}",))):
            apart = () if host is own else ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {folder}/r && exec "$@"', "sh")
            ray = (*host.wrap, *apart, str(Path(sys.executable).with_name("ray")), "start", f"--node-ip-address={host.address}")
            stack.enter_context(_ray([*ray, *flags, *COMMON], environment, Path(folder) / f"{host.name}.log"))
        yield own, other, ray_address, environment


@contextmanager
def _ray(command_line: list[str], environment: dict[str, str], log_file: Path) -> Iterator[None]:
    for tries_left in reversed(range(START_TRIES_MAX)):
        with _running(command_line, environment, log_file) as process:
            if _has_started(process, log_file):
                yield
                return
            said = log_file.read_text()[-2000:]
            assert tries_left, f"Ray did not start within {START_SECONDS_MAX} s, {START_TRIES_MAX} times: {command_line}\n{said}"


def _has_started(process: subprocess.Popen[bytes], log_file: Path) -> bool:
    give_up_at = time.monotonic() + START_SECONDS_MAX
    while "Ray runtime started" not in log_file.read_text():
        if process.poll() is not None or time.monotonic() > give_up_at:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def _running(command_line: list[str], environment: dict[str, str], log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log_file.open("wb") as log:
        process = subprocess.Popen(command_line, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.wait(30)
        wait_gone(family, 20)
