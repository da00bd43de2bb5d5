"""Many simulated nodes from outside: their enrolment before a coordinator starts, and the processes in which their agents run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

from potluck_coordinator.directory.directory import Directory
from potluck_coordinator.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.identity import certificate_request, new_private_key
from potluck_protocol.values import Inventory
from tests.benchmarks.processes import Child
from tests.support.simulated_agents import EnrolledKey, Nodes

ENROLLED_AT_ONCE: Final = 250
TOKEN_SECONDS: Final = 3600


async def enrol_nodes(data_dir: Path, count: int) -> tuple[EnrolledKey, ...]:
    """Nodes of a coordinator that does not run yet, enrolled by its own desk with a join token each."""
    directory = await Directory.open(Settings(data_dir=data_dir, http_port=0, grpc_port=0, link_port=0), SystemClock())
    try:
        owner = (await directory.accounts.list_accounts())[0].account_id

        async def enrol(number: int) -> EnrolledKey:
            token, secret = await directory.accounts.create_join_token(owner, TOKEN_SECONDS)
            key = new_private_key()
            joined = await directory.enrolment.join(certificate_request(key), token.token_id, secret, f"box-{number}", Inventory())
            return EnrolledKey(joined.node_id, key.decode(), joined.certificate_pem)

        keys: list[EnrolledKey] = []
        while len(keys) < count:
            numbers = range(len(keys), min(count, len(keys) + ENROLLED_AT_ONCE))
            keys += await asyncio.gather(*(enrol(number) for number in numbers))
        return tuple(keys)
    finally:
        directory.close()


class Fleet:
    """Agents in several processes, dialling one port. Leave it as a context manager so that they are stopped.

    Args:
        folder: for their keys and logs.
        nodes: all that may be linked.
        process_count: among how many processes they are dealt out.
    """

    def __init__(self, folder: Path, nodes: Nodes, process_count: int) -> None:
        folder.mkdir()
        self._dealt = [nodes.keys[number::process_count] for number in range(process_count)]
        self._children = []
        for number, keys in enumerate(self._dealt):
            path = Nodes(nodes.target, nodes.ca_certificate_pem, keys).write(folder / f"nodes-{number}.json")
            command = [sys.executable, "-m", "tests.support.simulated_agents", str(path)]
            self._children.append(Child(command, folder / f"agents-{number}.log", pipe=True))
        self._threads = ThreadPoolExecutor(process_count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.stop()
        self._threads.shutdown()

    @property
    def process_ids(self) -> tuple[int, ...]:
        return tuple(child.process_id for child in self._children)

    def link(self, count: int, per_second: float, seconds_max: float = 120.0) -> None:
        """Until so many are linked; raises RuntimeError where they are not in time."""
        shares = [len(range(number, count, len(self._children))) for number in range(len(self._children))]
        asked = [{"do": "link", "count": share, "per_second": per_second / len(self._children)} for share in shares]
        self._ask(asked)
        self.wait(count, seconds_max)

    def wait(self, count: int, seconds_max: float) -> None:
        """Until so many are linked; raises RuntimeError where they are not in time."""
        found = self._ask_all(do="wait", seconds=seconds_max)
        linked = sum(status["linked"] for status in found)
        if linked != count:
            raise RuntimeError(f"{linked} of {count} nodes are linked after {seconds_max:.0f} s: {found}")

    def beat_every(self, seconds: float | None, *, steady: bool = False) -> None:
        """From now on; None: as the coordinator says."""
        self._ask_all(do="period", seconds=seconds, steady=steady)

    def beat_count(self) -> int:
        """Beats sent so far."""
        return sum(status["beats"] for status in self._ask_all(do="status"))

    def idle_periods(self) -> list[float]:
        """Which idle periods the agents were told."""
        return sorted({seconds for status in self._ask_all(do="status") for seconds in status["idle_seconds"]})

    def since(self, at: float) -> tuple[list[float], list[float], dict[str, int]]:
        """Seconds after a moment of the monotonic clock, of each node's last welcome and of every dial; and why dials failed."""
        found = self._ask_all(do="since", at=at)
        welcomed, dialled = (sorted(moment for part in found for moment in part[name]) for name in ("welcomed", "dialled"))
        failures: Counter[str] = Counter()
        for part in found:
            failures.update(part["failures"])
        return welcomed, dialled, dict(failures.most_common(8))

    def churn(self, seconds: float, per_second: float) -> None:
        """For so long, so many agents a second end, with a goodbye or without, and begin anew."""
        self._ask_all(do="churn", seconds=seconds, per_second=per_second / len(self._children))

    def leave(self) -> None:
        """Everybody says goodbye."""
        self._ask_all(do="leave")

    def _ask_all(self, **line: Any) -> list[dict[str, Any]]:
        return self._ask([line] * len(self._children))

    def _ask(self, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        def ask(child: Child, line: dict[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = json.loads(child.ask(json.dumps(line)))
            return answer

        found = list(self._threads.map(ask, self._children, lines))
        if failed := [failure for status in found for failure in status.get("failed", ())]:
            raise RuntimeError(f"agents failed: {failed[:3]}")
        return found


@contextlib.contextmanager
def bare_links(folder: Path, authority_dir: Path) -> Iterator[tuple[Child, int]]:
    """The bare server and its port."""
    child = Child([sys.executable, "-m", "tests.support.bare_links", str(authority_dir)], folder / "bare.log", pipe=True)
    try:
        assert child.process.stdout is not None
        port = child.process.stdout.readline()
        if not port:
            raise RuntimeError(f"the bare server ended:\n{child.log_tail()}")
        yield child, int(port)
    finally:
        child.stop()


def settle(seconds: float) -> None:
    """Lets what was begun come to rest."""
    time.sleep(seconds)
