"""Two hosts on one machine: network namespaces joined by a veth pair, made by the test and removed by it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace with its address on the wire between the two."""

    name: str
    address: str

    @property
    def wrap(self) -> tuple[str, ...]:
        """What to put before a command so that it runs there."""
        return ("ip", "netns", "exec", self.name)

    def run(self, *command: str) -> str:
        return subprocess.run([*self.wrap, *command], check=True, capture_output=True, text=True, timeout=60).stdout

    def listeners(self) -> list[tuple[str, int]]:
        """Address and port of every listening TCP socket."""
        found = []
        for line in self.run("ss", "--tcp", "--listening", "--numeric", "--no-header").splitlines():
            address, _, port = line.split()[3].rpartition(":")
            found.append((address.strip("[]"), int(port)))
        return found


def available() -> bool:
    """Whether this process may make namespaces."""
    made = _ip("netns", "add", "potluck-probe", check=False)
    if made:
        _ip("netns", "del", "potluck-probe", check=False)
    return made


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The coordinator's host and the volunteer's."""
    hosts = (Host("potluck-operator", "10.213.0.1"), Host("potluck-volunteer", "10.213.0.2"))
    for host in hosts:
        _ip("netns", "del", host.name, check=False)
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


def _ip(*arguments: str, check: bool = True) -> bool:
    try:
        return subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=30).returncode == 0
    except FileNotFoundError:
        if check:
            raise
        return False
