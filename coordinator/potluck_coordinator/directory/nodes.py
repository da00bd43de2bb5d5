"""Which nodes there are, how they do, and what they should run.

Decides what ends a node (its owner's leave, a revocation) and when one counts as offline; `domain.planning` says what runs where,
`domain.uptime` what a minute was. What is live is kept in memory, for gateways report it anew every second; epochs, ends and uptime are
kept in the books. It must not know links.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from potluck_coordinator.desks import NodeRecord, NodeReport, SessionGrant
from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.domain import uptime
from potluck_coordinator.domain.catalogue import CatalogueEntry
from potluck_coordinator.domain.planning import plan
from potluck_coordinator.domain.uptime import Coverage, JudgedMinute, Verdict
from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.store import Store
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import DesiredEngine, DesiredState, EngineStatus, GoodbyeReason, Hello, ModelId, NodeId, NodeState

_log = structlog.get_logger()


@dataclass(slots=True)
class _LiveNode:
    """What the last report said of a connected node."""

    epoch: int
    state: NodeState
    engines: tuple[EngineStatus, ...]
    suspect: bool
    reported_at_seconds: float


class Nodes:
    """The `NodeDesk`.

    Args:
        store: the books.
        board: where gateways read the wishes and the outcasts.
        clock: for dates and for the age of reports.
        silence_seconds_max: after so long without a report a node counts as offline, even if no gateway said so.
    """

    def __init__(self, store: Store, board: SnapshotBoard, clock: Clock, silence_seconds_max: float) -> None:
        self._store = store
        self._board = board
        self._clock = clock
        self._silence_seconds_max = silence_seconds_max
        self._live: dict[NodeId, _LiveNode] = {}
        self._refreshing = asyncio.Lock()
        self._steady_offset_ms = clock.unix_ms() - clock.monotonic_seconds() * 1000
        self._uptime = uptime.start(self._steady_ms())
        self._reported_at_ms = self._steady_ms()

    async def refresh(self) -> None:
        """Plans anew and tells the gateways: called at start, when models may have changed, and whenever a node has come or gone."""
        async with self._refreshing:
            desired, outcasts, models = await self._store.run(self._planned)
            self._board.publish(desired=desired, outcasts=outcasts, models=models)

    async def list_nodes(self) -> tuple[NodeRecord, ...]:
        """Every node that ever enrolled."""
        enrolled, totals = await self._store.run(lambda work: (work.nodes.list_all(), work.uptime.totals()))
        return tuple(self._record(node, *totals.get(node.node_id, (0, 0))) for node in enrolled)

    async def revoke_node(self, node_id: NodeId, reason: str) -> None:
        """Puts the node out for good; its link ends with the next snapshot that the gateways read. Raises NOT_FOUND."""

        def revoke(work: UnitOfWork) -> None:
            if work.nodes.get(node_id) is None:
                raise PotluckError(ErrorCode.NOT_FOUND, f"There is no node {node_id}.", param="node_id")
            work.nodes.end(node_id, NodeStatus.REVOKED, reason)

        await self._store.run(revoke)
        _log.info("node_revoked", node_id=node_id, reason=reason)
        self._live.pop(node_id, None)
        await self.refresh()

    async def open_session(self, hello: Hello) -> SessionGrant:
        """As `NodeDesk.open_session`."""

        def begin(work: UnitOfWork) -> EnrolledNode:
            epoch = work.nodes.next_epoch(hello.node_id)
            node = work.nodes.get(hello.node_id)
            if epoch is None or node is None:
                raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "This node is no longer part of the pool; ask for a new invite.")
            work.nodes.describe(hello.node_id, hello.inventory, hello.agent_version)
            work.nodes.saw(hello.node_id, self._clock.unix_ms())
            return node

        node = await self._store.run(begin)
        self._live[node.node_id] = _LiveNode(node.epoch, hello.state, hello.engines, suspect=False, reported_at_seconds=self._now())
        desired = self._board.snapshot.desired.get(node.node_id, DesiredState())
        return SessionGrant(node.epoch, node.owner_account_id, desired)

    async def close_session(self, node_id: NodeId, epoch: int, reason: GoodbyeReason | None) -> None:
        """As `NodeDesk.close_session`; a session that a newer one has replaced says nothing about the node."""
        live = self._live.get(node_id)
        replaced = live is not None and live.epoch > epoch
        if not replaced:
            self._live.pop(node_id, None)
        await self._store.run(lambda work: work.nodes.saw(node_id, self._clock.unix_ms()))
        if reason is GoodbyeReason.LEAVING and not replaced:
            await self._store.run(lambda work: work.nodes.end(node_id, NodeStatus.LEFT, "taken out by its owner"))
            await self.refresh()

    async def report(self, reports: Sequence[NodeReport]) -> None:
        """Takes a gateway's second-by-second word; it is also how a directory that was restarted learns who is there."""
        now = self._now()
        for report in reports:
            known = self._live.get(report.node_id)
            if known is None or known.epoch <= report.epoch:
                self._live[report.node_id] = _LiveNode(report.epoch, report.state, report.engines, report.suspect, now)
        self._reported_at_ms = self._steady_ms()
        coverages = [Coverage(report.node_id, report.covered_seconds) for report in reports]
        self._uptime = uptime.record(self._uptime, coverages, self._reported_at_ms)

    def gateway_started(self) -> None:
        """A new gateway needs its first minute: what nodes could not reach is not held against them."""
        self._uptime = uptime.start(self._steady_ms())

    async def judge_minutes(self) -> None:
        """Books the minutes that have ended. While no gateway reports, nobody watches, and no minute counts."""
        self._forget_silent()
        if (self._uptime.next_minute + 1) * uptime.MINUTE_MS + uptime.REPORT_DELAY_MS > self._reported_at_ms:
            return
        nodes = await self._store.run(lambda work: work.nodes.list_all())
        enrolled = {node.node_id: node.enrolled_at_unix_ms for node in nodes if node.status is NodeStatus.ACTIVE}
        self._uptime, judged = uptime.close_minutes(self._uptime, enrolled, self._reported_at_ms)
        live, now_ms = tuple(self._live), self._clock.unix_ms()

        def book(work: UnitOfWork) -> None:
            for minute in judged:
                _book_minute(work, minute)
            for node_id in live:
                work.nodes.saw(node_id, now_ms)

        await self._store.run(book)

    def _planned(self, work: UnitOfWork) -> tuple[Mapping[NodeId, DesiredState], Mapping[NodeId, str], Mapping[ModelId, CatalogueEntry]]:
        nodes = work.nodes.list_all()
        models = work.catalogue.entries()
        active = [node.node_id for node in nodes if node.status is NodeStatus.ACTIVE]
        wishes = plan(work.catalogue.deployments(), models, active)
        before = self._board.snapshot.desired

        def state(node_id: NodeId, engines: tuple[DesiredEngine, ...]) -> DesiredState:
            known = before.get(node_id)
            if known is not None and known.engines == engines:
                return known
            return DesiredState(work.state.advance(StateName.DESIRED_REVISION), engines)

        desired = {node_id: state(node_id, engines) for node_id, engines in wishes.items()}
        return desired, {node.node_id: node.status_reason for node in nodes if node.status is not NodeStatus.ACTIVE}, models

    def _record(self, node: EnrolledNode, up_minutes: int, down_minutes: int) -> NodeRecord:
        live = self._live.get(node.node_id)
        now_ms = self._clock.unix_ms()
        return NodeRecord(
            node_id=node.node_id,
            display_name=node.display_name,
            owner_account_id=node.owner_account_id,
            connection=_connection(node.status, live),
            state=live.state if live is not None else NodeState.DRAINING,
            engines=live.engines if live is not None else (),
            inventory=node.inventory,
            agent_version=node.agent_version,
            up_minutes=up_minutes,
            down_minutes=down_minutes,
            unknown_minutes=uptime.unknown_minutes(node.enrolled_at_unix_ms, now_ms, up_minutes, down_minutes),
            last_seen_at_unix_ms=now_ms if live is not None else node.last_seen_at_unix_ms,
        )

    def _forget_silent(self) -> None:
        oldest = self._now() - self._silence_seconds_max
        for node_id in [node_id for node_id, live in self._live.items() if live.reported_at_seconds < oldest]:
            del self._live[node_id]

    def _now(self) -> float:
        return self._clock.monotonic_seconds()

    def _steady_ms(self) -> int:
        return int(self._steady_offset_ms + self._clock.monotonic_seconds() * 1000)


def _book_minute(work: UnitOfWork, minute: JudgedMinute) -> None:
    for node_id, verdict in minute.verdicts.items():
        if verdict is not Verdict.UNKNOWN:
            work.uptime.add(node_id, minute.minute // 60, int(verdict is Verdict.UP), int(verdict is Verdict.DOWN))


def _connection(status: NodeStatus, live: _LiveNode | None) -> str:
    if status is not NodeStatus.ACTIVE:
        return str(status)
    if live is None:
        return "offline"
    return "suspect" if live.suspect else "connected"
