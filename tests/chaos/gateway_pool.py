"""A pool of several gateways, on one host or two: which gateway has which node, and clients that are one gateway's.

On one host the gateways share their ports, and the kernel deals connections to them at random: whoever wants a certain one tries until it
has it. On two hosts each has an address of its own.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import URLError

import psutil

from potluck import Client
from tests.support.coordinator_process import CoordinatorProcess, runs, wait_until
from tests.support.namespaces import Host
from tests.support.pool_processes import MODEL, SLOT_COUNT, ChatStream, NodeProcess, Pool, new_invite, write_catalogue
from tests.support.refusals import REFUSED_SECONDS_MAX, told_seconds

GATEWAY_COUNT = 2
BACK_SECONDS_MAX = 30.0
SCRIPT = {"tokens": [f" {number}" for number in range(50)], "token_count": 400, "inter_token_ms": 10}
LOAD_TOKENS = 150
SPREAD_TRIES = 20
SLOTS_PER_NODE = 2
"""As many clients ask at a time: a gateway's own nodes are not enough for its clients."""
DIAL_TRIES = 64

End = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the gateways are: all on this host, or the second one on another, which joined a Ray cluster of this one's."""

    other: Host | None = None
    own_address: str = "127.0.0.1"
    ray_address: str = ""

    def address(self, number: int) -> str:
        """Of a gateway."""
        return self.other.address if self.other is not None and number else self.own_address

    def wrap(self, number: int) -> tuple[str, ...]:
        """What puts a command on a gateway's host."""
        return self.other.wrap if self.other is not None and number else ()


class GatewayPool(Pool):
    """Its clients and its watchers go to any gateway that takes their connection, as with a name of several addresses."""

    def __init__(self, folder: Path, coordinator: CoordinatorProcess, cluster: Cluster) -> None:
        super().__init__(folder, coordinator, [])
        self.cluster = cluster
        self._turns = itertools.count()

    @cached_property
    def http_port(self) -> int:
        return self.coordinator.wait_ready()["http"]

    def client(self) -> Client:
        return Client(next(self._urls()), api_key=self.api_key)

    def stream(self, **fields: Any) -> ChatStream:
        refused: URLError | None = None
        for url in self._urls():
            try:
                return ChatStream(url.partition("#")[0], self.api_key, {"max_tokens": LOAD_TOKENS, **fields})
            except URLError as error:
                if not isinstance(error.reason, ConnectionRefusedError):
                    raise
                refused = error
        raise AssertionError("no address") if refused is None else refused

    def _urls(self) -> Iterator[str]:
        """Of all addresses, each time another one first."""
        addresses = sorted({self.cluster.address(number) for number in range(GATEWAY_COUNT)})
        first = next(self._turns)
        turned = (addresses[(first + number) % len(addresses)] for number in range(len(addresses)))
        return (self.url.replace(self.cluster.own_address, address) for address in turned)

    def gateways(self) -> dict[int, psutil.Process]:
        """Every gateway's process that serves now, by its number."""
        found = self._gateways_of_hosts() if self.cluster.other is not None else self._gateways_of_log()
        return {number: process for number, process in found.items() if runs(process)}

    def directory(self) -> psutil.Process:
        if self.cluster.other is None:
            return self.coordinator.actor("DirectoryActor")
        return next(process for process, title in _actors_of_this_cluster() if "DirectoryActor" in title)

    def _gateways_of_hosts(self) -> dict[int, psutil.Process]:
        """By their network namespaces: what the other host's gateway logs goes to Ray's files there."""
        here = Path("/proc/self/ns/net").readlink()
        found: dict[int, psutil.Process] = {}
        for process, title in _actors_of_this_cluster():
            with suppress(OSError):
                if "GatewayActor" in title:
                    found[int(Path(f"/proc/{process.pid}/ns/net").readlink() != here)] = process
        return found

    def _gateways_of_log(self) -> dict[int, psutil.Process]:
        found: dict[int, psutil.Process] = {}
        for line in self.coordinator.log().splitlines():
            with suppress(ValueError, psutil.NoSuchProcess, KeyError):
                event = json.loads(line)
                if event["event"] == "actor_serving" and event["actor"] == "GatewayActor":
                    found[event["number"]] = psutil.Process(event["process_id"])
        return found

    def homes(self) -> dict[NodeProcess, int | None]:
        """The number of the gateway that has each node's link now, by both ends' sockets; None where it has none."""
        connections = _connections() | (set() if self.cluster.other is None else _connections_of(self.cluster.other))
        numbers = {process.pid: number for number, process in self.gateways().items()}
        ends = {(near, far): numbers[pid] for pid, near, far in connections if pid in numbers}
        found: dict[NodeProcess, int | None] = {}
        for node in self.nodes:
            dialled = (ends.get((far, near)) for pid, near, far in connections if pid == node.process.pid)
            found[node] = next((number for number in dialled if number is not None), None)
        return found

    def spread(self) -> None:
        """Sees to it that each gateway has a node."""
        for _ in range(SPREAD_TRIES):
            homes = self.homes()
            if set(homes.values()) >= set(range(GATEWAY_COUNT)):
                return
            one = next(node for node in self.nodes if list(homes.values()).count(homes[node]) > 1)
            one.process.terminate()
            one.process.wait(20)
            self._forget_gateway(one, next(number for number in range(GATEWAY_COUNT) if number not in homes.values()))
            one.start_again()
            self.wait_connected()
        raise AssertionError(f"after {SPREAD_TRIES} tries the nodes are with {list(self.homes().values())}")

    def _forget_gateway(self, node: NodeProcess, wanted: int) -> None:
        """The node dials anew: on one host wherever the kernel has it, on two the gateway that is wanted first."""
        file = node.folder / "state" / "gateways.json"
        known = json.loads(file.read_text())["known"] if self.cluster.other is not None else []
        file.unlink(missing_ok=True)
        there = [address for address in known if address.startswith(f"{self.cluster.address(wanted)}:")]
        if there:
            file.write_text(json.dumps({"last": there[0], "known": known}))

    def wait_linked(self, seconds_max: float) -> float:
        """Seconds until every node has its link with a gateway that lives, and serves there."""
        started = time.monotonic()
        wait_until(lambda: None not in self.homes().values(), seconds_max, "every node has a link")
        self.wait_connected(seconds_max=seconds_max)
        return time.monotonic() - started


def _actors_of_this_cluster() -> list[tuple[psutil.Process, str]]:
    """With their titles. Others may run coordinators on this machine; ours have our token."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, OSError):
            title = "".join(process.cmdline())
            if title.startswith("ray::") and process.environ().get("RAY_AUTH_TOKEN_PATH") == os.environ["RAY_AUTH_TOKEN_PATH"]:
                found.append((process, title))
    return found


def _connections() -> set[tuple[int, End, End]]:
    """Process, near end and far end of this host's established connections."""
    return {
        (one.pid, _end(*one.laddr), _end(*one.raddr))
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_ESTABLISHED and one.pid is not None
    }


def _connections_of(host: Host) -> set[tuple[int, End, End]]:
    """The same of another host."""
    found = set()
    for line in host.run("ss", "--tcp", "--numeric", "--processes", "--no-header", "state", "established").splitlines():
        words = line.split()
        near, far = (_end(*word.rsplit(":", 1)) for word in words[2:4])
        found |= {(int(word.split(",")[0]), near, far) for word in line.split("pid=")[1:]}
    return found


def _end(host: str, port: str | int) -> End:
    return host.strip("[]").removeprefix("::ffff:"), int(port)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client has got in the end, and how often it was told before to come again."""

    node_id: str
    body: bytes
    refused_count: int

    @property
    def is_whole(self) -> bool:
        return self.body.rstrip().endswith(b"[DONE]") and b'"error"' not in self.body


class GatewayClient:
    """One client that asks one gateway.

    Args:
        pool: where.
        number: the gateway's.
    """

    def __init__(self, pool: GatewayPool, number: int) -> None:
        self._pool = pool
        self._number = number
        self.refused_count = 0
        self._head = b""
        self.response: http.client.HTTPResponse | None = None

    def ask(self, *, token_count: int = 100, **headers: str) -> http.client.HTTPResponse:
        """Once. Each time over a new connection: one that brings nothing for ten seconds is closed."""
        body = {"model": MODEL, "stream": True, "max_tokens": token_count, "messages": [{"role": "user", "content": "count"}]}
        sent = {"authorization": f"Bearer {self._pool.api_key}", "content-type": "application/json", **headers}
        connection = self.dial()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), sent)
        return connection.getresponse()

    def begin(self, *, token_count: int = 100, **headers: str) -> GatewayClient:
        """Asks until the answer begins, as often as it is told to come again. Its first bytes may still be under way."""
        give_up_at = time.monotonic() + REFUSED_SECONDS_MAX
        while True:
            self.response = self.ask(token_count=token_count, **headers)
            seconds = told_seconds(self.response.status, self.response.headers)
            if seconds is None or time.monotonic() + seconds > give_up_at:
                return self
            self.refused_count += 1
            self.response.close()
            time.sleep(seconds)

    def wait_begun(self) -> GatewayClient:
        """Until a first token is there."""
        assert self.response is not None
        self._head = self.response.read1(1)
        return self

    def end(self) -> Answer:
        """Reads what has begun to its end."""
        assert self.response is not None
        node_id = self.response.headers.get("x-potluck-node", "")
        try:
            body = self._head + self.response.read()
        except (http.client.IncompleteRead, OSError) as error:
            body = repr(error).encode()
        return Answer(node_id, body, self.refused_count)

    def dial(self) -> http.client.HTTPConnection:
        """Made so often until it leads to the gateway."""
        for _ in range(DIAL_TRIES):
            connection = http.client.HTTPConnection(self._pool.cluster.address(self._number), self._pool.http_port, timeout=60)
            connection.request("GET", "/metrics", headers={"authorization": f"Bearer {self._pool.api_key}"})
            if b'potluck_nodes_connected{gateway="%d"}' % self._number in connection.getresponse().read():
                return connection
            connection.close()
        raise AssertionError(f"no connection out of {DIAL_TRIES} led to gateway {self._number}")


def serves(pool: GatewayPool, number: int) -> bool:
    """Whether a client can reach that gateway."""
    with suppress(AssertionError, OSError, http.client.HTTPException):
        GatewayClient(pool, number).dial().close()
        return True
    return False


def _joined(pool: Pool, folder: Path, wrap: tuple[str, ...]) -> NodeProcess:
    return NodeProcess(folder, new_invite(pool), wrap=wrap)


@contextmanager
def pool_of_gateways(folder: Path, node_count: int = 4, cluster: Cluster | None = None) -> Iterator[GatewayPool]:
    """A coordinator of two gateways, and nodes; of two hosts every second one is on the other."""
    where = cluster or Cluster()
    catalogue = write_catalogue(folder / "models", SCRIPT)
    catalogue.write_text(catalogue.read_text().replace(f"slot_count = {SLOT_COUNT}", f"slot_count = {SLOTS_PER_NODE}"))
    flags = ["--catalogue", str(catalogue), "--gateways", str(GATEWAY_COUNT), "--host", where.own_address]
    if where.ray_address:
        flags += ["--ray-address", where.ray_address]
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", *flags))
        coordinator.wait_ready()
        pool = GatewayPool(folder, coordinator, where)
        with ThreadPoolExecutor(node_count) as threads:
            joining = [threads.submit(_joined, pool, folder / f"node-{number}", where.wrap(number % 2)) for number in range(node_count)]
        pool.nodes += [stack.enter_context(node.result()) for node in joining if node.exception() is None]
        for node in joining:
            node.result()
        pool.wait_connected()
        yield pool
