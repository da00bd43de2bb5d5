"""A real coordinator as a child process, and ways to look at its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

START_SECONDS_MAX = 60.0


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> float:
    """Seconds it took."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if holds():
            return time.monotonic() - started
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class CoordinatorProcess:
    """`potluck coordinator serve` on a folder, on loopback; leave it as a context manager so that it is stopped."""

    def __init__(self, data_dir: Path, *flags: str, ports: tuple[int, int, int] = (0, 0, 0), wrap: tuple[str, ...] = ()) -> None:
        self.data_dir = data_dir
        self.log_file = data_dir.parent / f"{data_dir.name}.log"
        named = zip(("--http-port", "--grpc-port", "--link-port"), ports, strict=True)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*wrap, sys.executable, "-c", "from potluck_coordinator.command import app; app()", "serve"),
                    *("--data-dir", str(data_dir), "--log-format", "json"),
                    *(part for name, port in named for part in (name, str(port))),
                    *flags,
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)

    def wait_ready(self) -> dict[str, int]:
        """The endpoints, once they are published."""

        def published() -> bool:
            assert self.process.poll() is None, f"the coordinator ended with {self.process.returncode}:\n{self.log()}"
            # A coordinator that was killed leaves its own file behind.
            return self.endpoints_file.exists() and json.loads(self.endpoints_file.read_text())["pid"] == self.process.pid

        wait_until(published, START_SECONDS_MAX, f"endpoints.json of {self.data_dir}\n{self.log()}")
        return json.loads(self.endpoints_file.read_text())

    @property
    def endpoints_file(self) -> Path:
        return self.data_dir / "endpoints.json"

    def log(self) -> str:
        return self.log_file.read_text()

    def operator(self) -> dict[str, str]:
        return json.loads((self.data_dir / "operator.json").read_text())

    def get(self, path: str, api_key: str = "") -> tuple[int, bytes]:
        """Status and body of a GET; status 0 where nobody answers."""
        url, _, _ = self.operator()["url"].partition("#")  # the CA's fingerprint, where the host is not loopback
        request = urllib.request.Request(url + path, headers={"authorization": f"Bearer {api_key}"} if api_key else {})
        try:
            with urllib.request.urlopen(request, timeout=15) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, urllib.error.URLError):
            return 0, b""

    def processes(self) -> list[psutil.Process]:
        """The coordinator's process and everything it started."""
        driver = psutil.Process(self.process.pid)
        return [driver, *driver.children(recursive=True)]

    def watch_to_its_end(self, seconds: float) -> dict[psutil.Process, str]:
        """Every process that it ever had below it, with its last name, once it has ended by itself."""
        seen: dict[psutil.Process, str] = {}

        def has_ended() -> bool:
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    # Anew each time: one that was seen before its exec bore its parent's name.
                    seen[process] = process.name()
            return self.process.poll() is not None

        wait_until(has_ended, seconds, "the end of the coordinator")
        return seen

    def actor(self, name: str) -> psutil.Process:
        """The process of "DirectoryActor" or "GatewayActor"."""
        # While it starts, Ray titles it "ray::directory:DirectoryActor.__init__", later "ray::DirectoryActor".
        titles = [(process, _title(process)) for process in self.processes()]
        found = [process for process, title in titles if title.startswith("ray::") and name in title]
        assert len(found) == 1, [process.cmdline() for process in self.processes()]
        return found[0]

    def signal_group(self, number: int) -> None:
        """As a terminal does with Ctrl-C: every process of the group gets it."""
        os.killpg(self.process.pid, number)


def _title(process: psutil.Process) -> str:
    """Empty for one that has just ended."""
    try:
        return "".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def runs(process: psutil.Process) -> bool:
    """Whether it still does; a zombie does not. One that ends between two looks does not, either."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run."""
    return [process for process in processes if runs(process)]


def wait_gone(processes: list[psutil.Process], seconds: float) -> None:
    """Waits until none of them runs; names those that still do."""
    deadline = time.monotonic() + seconds
    while left := alive(processes):
        assert time.monotonic() < deadline, f"still there after {seconds} s: {[_described(process) for process in left]}"
        time.sleep(0.05)


def _described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} of {process.ppid()}, {process.status()}: {' '.join(process.cmdline()).strip()[-120:]}"
    except psutil.NoSuchProcess:
        return f"{process.pid}, gone meanwhile"
