"""A Ray cluster of two hosts on one machine, as an operator starts one: `ray start` in each of two network namespaces, with a token."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.support.coordinator_process import wait_gone, wait_until
from tests.support.namespaces import Host, two_hosts

RAY_PORT = 6379
"""In a namespace of its own: nobody else has it."""
START_SECONDS_MAX = 90.0
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
            log_file = Path(folder) / f"{host.name}.log"
            stack.enter_context(_running([*ray, *flags, *COMMON], environment, stack.enter_context(log_file.open("wb"))))
            wait_until(lambda log_file=log_file: "Ray runtime started" in log_file.read_text(), START_SECONDS_MAX, f"Ray on {host.name}")
        yield own, other, ray_address, environment


@contextmanager
def _running(command_line: list[str], environment: dict[str, str], log: Any) -> Iterator[None]:
    process = subprocess.Popen(command_line, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(30)
        wait_gone(family, 20)
