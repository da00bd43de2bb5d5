"""`python -m tests.benchmarks.directory_loop --nodes 1000 --deployments 20`: how long the directory's event loop waits while it plans.

Decides a directory's second: every node is reported once, by pickle as over the desks' socket, some come and go, so that each second has
a new plan, and engines' figures change, so that something is learned. The nodes' desk, the planner and the books on disk are real. The
watch asks for a turn each millisecond; its longest wait is what a payment or a hello may have to wait. Milliseconds are of the wall.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import pickle
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.bootstrap import offer
from potluck_coordinator.directory.directory import spare_collections
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.node_reports import NodeReport
from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
from potluck_protocol.values import EngineState, NodeId, NodeState
from tests.benchmarks.planning import pool, wishes
from tests.support.books import Books
from tests.support.planning import status

if TYPE_CHECKING:
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.values import DesiredEngine, EngineStatus, ReplicaId

CHURN_SHARE: Final = 0.002
"""Of the nodes: so many pause or come back in a second."""
SPOKEN_SHARE: Final = 0.2
"""Of the nodes: so many say new figures of their engines in a second, as with a heartbeat each five seconds."""


class Pool:
    """The nodes of one directory, and what they say."""

    def __init__(self, books: Books, node_count: int, deployment_count: int, seed: int) -> None:
        self.books, self.draw = books, random.Random(seed)
        self.views: dict[NodeId, NodeView] = pool(node_count, seed)
        self.entries, self.deployments = wishes(node_count, deployment_count)
        self.board = SnapshotBoard(1)
        self.nodes = Nodes(books.store, self.board, books.clock, 15.0)
        self.rates: dict[ReplicaId, float] = {}
        self.is_gateways_turn = False
        """What the gateway's process does is nobody's wait here."""

    async def found(self) -> None:
        self.books.add_people(*sorted({view.owner_account_id for view in self.views.values()}))
        await offer(self.books.store, self.entries.values())

        def add(work: Any) -> None:
            for view in self.views.values():
                work.nodes.add(_enrolled(view))
            for deployment in self.deployments:
                work.catalogue.deploy(deployment)

        self.books.run_now(add)

    async def second(self) -> None:
        """A gateway's report of everyone, as it comes over the socket."""
        self.books.clock.advance(1)
        self.is_gateways_turn = True
        sent = pickle.dumps([self._report(view) for view in self.views.values()])
        await asyncio.sleep(0.005)
        self.is_gateways_turn = False
        await self.nodes.report(pickle.loads(sent), {}, gateway_epoch=1)

    def churn(self) -> None:
        """Some pause or come back."""
        for node_id in self.draw.sample(sorted(self.views), max(1, int(CHURN_SHARE * len(self.views)))):
            self.views[node_id] = replace(self.views[node_id], connected=not self.views[node_id].connected)

    def _report(self, view: NodeView) -> NodeReport:
        desired = self.board.snapshot.desired.get(view.node_id)
        engines = tuple(self._status(engine) for engine in desired.engines) if desired is not None else ()
        return NodeReport(
            view.node_id,
            1,
            1.0,
            suspect=False,
            state=NodeState.SERVING if view.connected else NodeState.PAUSED,
            engines=engines,
            disk_free_bytes=view.disk_free_bytes,
            peer_measurements=tuple(view.peer_measurements.values()),
        )

    def _status(self, engine: DesiredEngine) -> EngineStatus:
        if engine.replica_id not in self.rates or self.draw.random() < SPOKEN_SHARE:
            self.rates[engine.replica_id] = self.draw.uniform(30, 40)
        group = {"group_id": engine.group.group_id, "group_generation": engine.group.generation} if engine.group else {}
        return replace(
            status(engine.replica_id, engine.model.model_id, EngineState.READY, **group),
            engine_kind=engine.engine_kind,
            engine_version="1.0",
            context_length_tokens=engine.context_length_tokens,
            decode_tokens_per_second=self.rates[engine.replica_id],
        )


def _enrolled(view: NodeView) -> EnrolledNode:
    return EnrolledNode(view.node_id, view.owner_account_id, "box", b"", NodeStatus.ACTIVE, "", 1, view.inventory, "1", 0, 0)


async def watch(running: Pool, waits: list[float]) -> None:
    """Each turn's wait, in milliseconds."""
    while True:
        began, is_gateways = time.monotonic(), running.is_gateways_turn
        await asyncio.sleep(0.001)
        if not (is_gateways or running.is_gateways_turn):
            waits.append(1000 * (time.monotonic() - began - 0.001))


async def seconds_of(running: Pool, seconds: int, *, is_first: bool) -> str:
    """So many seconds of the directory's life, in words."""
    waits: list[float] = []
    collected: list[float] = []

    def note(step: str, _info: Any) -> None:
        collected.append(time.monotonic() if step == "start" else 1000 * (time.monotonic() - collected.pop()))

    gc.callbacks.append(note)
    watching = asyncio.ensure_future(watch(running, waits))
    began = time.monotonic()
    if is_first:
        await running.nodes.refresh()
    for _ in range(seconds):
        running.churn()
        await running.second()
        await asyncio.sleep(max(0.0, 1.0 - (time.monotonic() - began) % 1.0))
    watching.cancel()
    gc.callbacks.remove(note)
    waits.sort()
    most, rare, half = waits[-1], waits[int(0.99 * len(waits))], waits[len(waits) // 2]
    took = f"{time.monotonic() - began:.1f} s, load {os.getloadavg()[0]:.1f}"
    return f"{took}: waited {most:.1f} ms at most, {rare:.1f} in 99 % of turns, {half:.1f} in half; longest collection {max(collected):.1f}"


async def measure(folder: Path, arguments: argparse.Namespace) -> None:
    books = Books(f"sqlite:///{folder / 'books.db'}")
    try:
        running = Pool(books, arguments.nodes, arguments.deployments, arguments.seed)
        await running.found()
        if not arguments.as_python_collects:
            spare_collections()
        print("from nothing:", await seconds_of(running, 1, is_first=True), flush=True)
        print("a plan each second:", await seconds_of(running, arguments.seconds, is_first=False), flush=True)
        planner = running.nodes._planner
        assert planner is not None
        print(f"what was learned: {len(msgspec.json.encode(planner.corrections)):,} bytes")
        began = time.monotonic()
        found_count = gc.collect()
        print(f"all collected: {1000 * (time.monotonic() - began):.1f} ms, {found_count} objects")
    finally:
        books.store.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--deployments", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--as-python-collects", action="store_true", help="without the directory's own word on garbage")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
