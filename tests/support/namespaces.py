"""Several hosts on one machine: network namespaces joined by veth pairs, made by the test and removed by it."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMESPACES = Path("/var/run/netns")
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace with its address on the wire between them."""

    name: str
    address: str

    @property
    def wrap(self) -> tuple[str, ...]:
        """What to put before a command so that it runs there; unlike `ip netns exec`, it leaves the control groups in sight."""
        return ("nsenter", f"--net={NAMESPACES / self.name}")

    def run(self, *command: str) -> str:
        return subprocess.run([*self.wrap, *command], check=True, capture_output=True, text=True, timeout=60).stdout

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside the block the calling thread's new sockets are this host's; other threads stay where they are."""
        kernel = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as home, (NAMESPACES / self.name).open() as there:
            _set_namespace(kernel, there.fileno())
            try:
                yield
            finally:
                _set_namespace(kernel, home.fileno())

    def listeners(self) -> list[tuple[str, int]]:
        """Address and port of every listening TCP socket."""
        found = []
        for line in self.run("ss", "--tcp", "--listening", "--numeric", "--no-header").splitlines():
            address, _, port = line.split()[3].rpartition(":")
            found.append((address.strip("[]"), int(port)))
        return found


def available() -> bool:
    """Whether this process may make namespaces."""
    name = f"potluck-{os.getpid()}-probe"
    made = _ip("netns", "add", name, check=False)
    if made:
        _ip("netns", "del", name, check=False)
    return made


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The coordinator's host and the volunteer's. Their names are this process's own."""
    hosts = (Host(f"potluck-{os.getpid()}-operator", "10.213.0.1"), Host(f"potluck-{os.getpid()}-volunteer", "10.213.0.2"))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", "potluck0", "netns", hosts[0].name, "type", "veth", "peer", "name", "potluck0", "netns", hosts[1].name)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "potluck0")
            host.run("ip", "link", "set", "potluck0", "up")
            host.run("ip", "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            _ip("netns", "del", host.name, check=False)


@contextmanager
def hosts_of_one_site(count: int) -> Iterator[tuple[Host, ...]]:
    """The coordinator's host, with a switch in it, and so many volunteers' on the switch. Their names are this process's own."""
    coordinator = Host(f"potluck-{os.getpid()}-0", "10.213.1.1")
    volunteers = tuple(Host(f"potluck-{os.getpid()}-{number}", f"10.213.1.{number + 1}") for number in range(1, count + 1))
    everyone = (coordinator, *volunteers)
    try:
        for host in everyone:
            _ip("netns", "add", host.name)
            host.run("ip", "link", "set", "lo", "up")
        coordinator.run("ip", "link", "add", "potluck0", "type", "bridge")
        for number, host in enumerate(volunteers):
            port = f"port{number}"
            _ip("link", "add", "potluck0", "netns", host.name, "type", "veth", "peer", "name", port, "netns", coordinator.name)
            coordinator.run("ip", "link", "set", port, "master", "potluck0")
            coordinator.run("ip", "link", "set", port, "up")
        for host in everyone:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "potluck0")
            host.run("ip", "link", "set", "potluck0", "up")
        yield everyone
    finally:
        for host in everyone:
            _ip("netns", "del", host.name, check=False)


def _set_namespace(kernel: ctypes.CDLL, descriptor: int) -> None:
    if kernel.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "the network namespace cannot be entered")


def _ip(*arguments: str, check: bool = True) -> bool:
    try:
        return subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=30).returncode == 0
    except FileNotFoundError:
        if check:
            raise
        return False
