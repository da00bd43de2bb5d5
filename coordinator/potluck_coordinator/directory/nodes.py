"""Which nodes there are, how they do, and what they should run.

Decides what ends a node (its owner's leave, a revocation), whom the operator may trust, when one counts as offline, and which of its words
call for a new plan; `planner` makes it, and `domain.uptime` says what a minute was. What is live is kept in memory, for gateways report it
anew every second; epochs, ends, trust, uptime and the plan are kept in the books. It must not know links.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Final

import structlog

from potluck_coordinator.desks import NodeRecord, SessionGrant
from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.gathering import Gathering
from potluck_coordinator.directory.in_thread import to_its_end
from potluck_coordinator.directory.kept_plan import KeptPlan
from potluck_coordinator.directory.live_nodes import LiveNode, connection_word, moves_here, node_view, still_there, summed
from potluck_coordinator.directory.planner import Planner, PoolFacts, Wishes
from potluck_coordinator.directory.returning import Returning
from potluck_coordinator.domain import uptime
from potluck_coordinator.domain.gateways import surplus_count
from potluck_coordinator.domain.node_view import foreign_bytes_known
from potluck_coordinator.domain.planning.age import age_seconds_max, rest_seconds
from potluck_coordinator.domain.planning.explain import NodeVerdict, Standing
from potluck_coordinator.domain.trust import trusted_replicas
from potluck_coordinator.domain.uptime import Coverage, Verdict
from potluck_coordinator.node_reports import NOBODY, Covered, NodeReport, ReportReceipt
from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.store import Store
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import DesiredState, GoodbyeReason, Hello, Inventory, ModelId, NodeId, NodeState, ReplicaId

NODE_COUNT_SECONDS: Final = 1.0
"""Each gateway's nodes are counted so often, however many gateways report in that time."""
_COUNTS: Final = {Verdict.UP: (1, 0), Verdict.DOWN: (0, 1)}
_log = structlog.get_logger()


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
        self._run_id = secrets.token_hex(8)
        self._beginning = Gathering(self._begin_sessions)
        self._live: dict[NodeId, LiveNode] = {}
        self.gateway_speaks: Callable[[int], None] = lambda _: None
        """Called with the epoch of each gateway that reports; raises for one that was replaced."""
        self.on_reports: Callable[[Sequence[NodeReport]], None] = lambda _: None
        """Called with what gateways report of nodes."""
        self._said_goodbye: set[NodeId] = set()  # of those that are not connected; the others fell silent
        self._card_foreign_bytes: dict[NodeId, Mapping[str, int]] = {}
        """Of every node that said so since this process began, until it is out: a link that breaks takes nothing back."""
        self._used_at: dict[ReplicaId, float] = {}
        self._waiting: dict[int, Mapping[ModelId, int]] = {}
        """By the epoch of the gateway where they wait."""
        self._kept_plan = KeptPlan(store)
        self._planner: Planner | None = None
        self._returning = Returning()
        self._facts = PoolFacts((), {}, {})
        self._standings: Mapping[ModelId, Standing] | None = None
        """Of the last plan; None while nobody has asked."""
        self._planned_at = -math.inf
        self._plan_ended_at = -math.inf
        self._plan_seconds = 0.0
        self._links_ended = False
        """By the coordinator itself, or with a gateway, since the last plan."""
        self._asked_count = self._answered_count = 0
        self._refreshing = asyncio.Lock()
        self._steady_offset_ms = clock.unix_ms() - clock.monotonic_seconds() * 1000
        self._uptime = uptime.start(self._steady_ms())
        self._coverages: list[Coverage] = []
        """What reports have said since the last second was over; taken in together, for that goes through all nodes."""
        self._node_counts: Counter[int] = Counter()
        """Of each gateway, as of `_counted_at`."""
        self._counted_at = -math.inf
        self._reported_at_ms = self._steady_ms()
        self._reported_at_ms_by_gateway: dict[int, int] = {}

    async def refresh(self) -> None:
        """Plans anew and tells the gateways: called at start, when models or wishes may have changed, and when nodes come, go or do."""
        self._asked_count += 1
        asked_count = self._asked_count
        async with self._refreshing:
            if self._answered_count >= asked_count:
                # Whoever waited before us saw what we saw.
                return
            await asyncio.sleep(rest_seconds(self._plan_seconds, self._now() - self._plan_ended_at))
            answering_count, began_at = self._asked_count, self._now()
            self._planned_at = began_at
            facts, outcasts, trusted_nodes = await self._store.run(self._known)
            if self._planner is None:
                self._planner = await self._kept_plan.planner(self._now())
            planner, self._facts = self._planner, facts
            if self._links_ended:
                self._links_ended = False
                planner.expect_back(self._now())
            try:
                wishes = await to_its_end(partial(planner.advance, facts, self._now()))
            except Exception:  # noqa: BLE001 - a fault of the planner's must not keep nodes out, or outcasts in: the last plan holds
                _log.exception("planning_failed")
                trusted = trusted_replicas(self._board.snapshot.desired, trusted_nodes)
                self._board.publish(outcasts=outcasts, models=facts.catalogue, flex_models=facts.flex_models, trusted_replicas=trusted)
                self._answered_count = answering_count
                return
            self._standings = None
            self._forget_uses(planner)
            await self._kept_plan.keep(planner, self._now())
            desired = await self._store.run(lambda work: self._desired(work, wishes))
            self._board.publish(
                desired=desired,
                outcasts=outcasts,
                models=facts.catalogue,
                flex_models=facts.flex_models,
                replica_payees=wishes.replica_payees,
                broken_groups=wishes.broken_groups,
                leaving=wishes.leaving,
                trusted_replicas=trusted_replicas(desired, trusted_nodes),
            )
            self._plan_ended_at = self._now()
            self._plan_seconds = self._plan_ended_at - began_at
            self._returning.planned(facts.nodes, desired)
            # Only now: whoever was told that it is done before this has failed would wait for what nobody does.
            self._answered_count = answering_count

    async def refresh_old_plan(self) -> None:
        """Plans anew where the last time is too long ago."""
        if self._now() - self._planned_at >= age_seconds_max(self._plan_seconds):
            await self.refresh()

    async def verdicts(self, model_id: ModelId) -> tuple[tuple[NodeVerdict, ...], Mapping[NodeId, str], str]:
        """Every node's part in a deployment, the nodes' names, and what became of the model's groups."""
        async with self._refreshing:
            assert self._planner is not None, "the directory plans before it serves"
            nodes = await self._store.run(lambda work: work.nodes.list_all())
            verdicts = await to_its_end(partial(self._planner.explain, self._facts, model_id, self._now()))
            return verdicts, {node.node_id: node.display_name for node in nodes}, self._planner.group_words(model_id)

    async def standings(self) -> tuple[Mapping[ModelId, Standing], Mapping[ModelId, int]]:
        """How far the last plan meets each wish, and how many requests wait for which model. Counted once a plan: anyone may ask."""
        if (known := self._standings) is None:
            async with self._refreshing:
                assert self._planner is not None, "the directory plans before it serves"
                if (known := self._standings) is None:
                    known = self._standings = await to_its_end(partial(self._planner.standings, self._facts, self._now()))
        return known, summed(self._waiting.values())

    async def list_nodes(self) -> tuple[NodeRecord, ...]:
        """Every node that ever enrolled."""
        enrolled, totals, trusted = await self._store.run(lambda work: (work.nodes.list_all(), work.uptime.totals(), work.nodes.trusted()))
        records = (self._record(node, *totals.get(node.node_id, (0, 0))) for node in enrolled)
        return tuple(replace(record, trusted=record.node_id in trusted) for record in records)

    async def revoke_node(self, node_id: NodeId, reason: str) -> None:
        """Puts the node out for good; its link ends with the next snapshot that the gateways read. Raises NOT_FOUND."""

        def revoke(work: UnitOfWork) -> None:
            if work.nodes.get(node_id) is None:
                raise PotluckError(ErrorCode.NOT_FOUND, f"There is no node {node_id}; see `potluck nodes`.", param="node_id")
            work.nodes.end(node_id, NodeStatus.REVOKED, reason)

        await self._store.run(revoke)
        _log.info("node_revoked", node_id=node_id, reason=reason)
        self._forget([node_id])
        self._card_foreign_bytes.pop(node_id, None)
        await self.refresh()

    async def set_node_trust(self, node_id: NodeId, *, trusted: bool) -> None:
        """The operator's word over an active node; for new requests it counts from the gateways' next snapshot on. Raises NOT_FOUND."""

        def say(work: UnitOfWork) -> None:
            node = work.nodes.get(node_id)
            if node is None or node.status is not NodeStatus.ACTIVE:
                was = f"Node {node_id} is not in the pool any more" if node is not None else f"There is no node {node_id}"
                raise PotluckError(ErrorCode.NOT_FOUND, f"{was}; see `potluck nodes`.", param="node_id")
            work.nodes.trust(node_id, self._clock.unix_ms()) if trusted else work.nodes.distrust(node_id)

        await self._store.run(say)
        _log.info("node_trusted" if trusted else "node_distrusted", node_id=node_id)
        await self.refresh()

    async def open_session(self, hello: Hello, *, gateway_epoch: int) -> SessionGrant:
        """As `NodeDesk.open_session`."""
        self.gateway_speaks(gateway_epoch)
        moves = moves_here(self._live.get(hello.node_id), hello.session_id, gateway_epoch)
        node = await self._beginning.ask(hello.node_id, (hello.inventory, hello.agent_version))
        if node is None:
            raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "This node is no longer part of the pool; ask for a new invite.")
        said = NodeReport(
            node_id=node.node_id,
            epoch=node.epoch,
            covered_seconds=0.0,
            suspect=False,
            state=hello.state,
            engines=hello.engines,
            cards=hello.cards,
            attached_model_names=hello.inventory.attached_model_names,
            line=hello.inventory.line,
            rest_causes=hello.rest_causes,
        )
        live = self._live[node.node_id] = replace(self._heard(said, self._now(), gateway_epoch), session_id=hello.session_id)
        if self._returning.is_as_planned(node_view(node, live), self._board.snapshot.desired.get(node.node_id)):
            # Nothing to do for this node that could not wait: one plan for all that come back follows within a second.
            self._planned_at = -math.inf
        else:
            self._links_ended = self._links_ended or moves
            await self.refresh()
        desired = self._board.snapshot.desired.get(node.node_id, DesiredState())
        return SessionGrant(node.epoch, node.owner_account_id, desired)

    async def _begin_sessions(self, said: Mapping[NodeId, tuple[Inventory, str]]) -> Mapping[NodeId, EnrolledNode]:
        now_ms = self._clock.unix_ms()
        return await self._store.run(lambda work: work.nodes.begin_sessions(said, now_ms))

    async def close_session(self, node_id: NodeId, epoch: int, reason: GoodbyeReason | None) -> None:
        """As `NodeDesk.close_session`; a session that a newer one has replaced says nothing about the node."""
        live = self._live.get(node_id)
        replaced = live is not None and live.report.epoch > epoch
        if reason is GoodbyeReason.COORDINATOR_STOPPING:
            self._links_ended = True
        if not replaced:
            self._forget([node_id])
            self._said_goodbye |= {node_id} if reason is GoodbyeReason.STOPPING else set()
        await self._store.run(lambda work: work.nodes.saw([node_id], self._clock.unix_ms()))
        if reason is GoodbyeReason.LEAVING and not replaced:
            await self._store.run(lambda work: work.nodes.end(node_id, NodeStatus.LEFT, "taken out by its owner"))
            self._card_foreign_bytes.pop(node_id, None)
        if not replaced:
            await self.refresh()

    async def report(
        self, reports: Sequence[NodeReport], waiting_counts: Mapping[ModelId, int], covered: Covered = NOBODY, *, gateway_epoch: int
    ) -> ReportReceipt:
        """Takes a gateway's second-by-second word; it is also how a directory that was restarted learns who is there."""
        self.gateway_speaks(gateway_epoch)
        deployed = {deployment.model_id for deployment in self._facts.deployments}
        waiting = {model_id: count for model_id, count in waiting_counts.items() if model_id in deployed}
        now, waits_anew = self._now(), waiting.keys() - summed(self._waiting.values()).keys()
        self._waiting[gateway_epoch] = waiting
        changed = [self._take(report, now, gateway_epoch) for report in reports]
        named = zip(covered.node_ids, covered.epochs, strict=True)
        unknown = frozenset(node_id for node_id, epoch in named if not still_there(self._live.get(node_id), epoch, now))
        self.on_reports(reports)
        if any(changed) or waits_anew:
            await self.refresh()
            self.gateway_speaks(gateway_epoch)  # it waited for the plan: that was not its silence
        last_report_ms, self._reported_at_ms = self._reported_at_ms, self._steady_ms()
        self._reported_at_ms_by_gateway[gateway_epoch] = self._reported_at_ms
        if uptime.went_unwatched(last_report_ms, self._reported_at_ms):
            self._uptime = uptime.start(self._reported_at_ms)
        self._coverages += [Coverage(report.node_id, report.covered_seconds, self._reported_at_ms) for report in reports]
        self._coverages += map(Coverage, covered.node_ids, covered.seconds, repeat(self._reported_at_ms))
        if now - self._counted_at >= NODE_COUNT_SECONDS:
            self._counted_at, self._node_counts = now, Counter(live.gateway_epoch for live in self._live.values())
        surplus = surplus_count(self._node_counts, self._board.snapshot.gateways.keys(), gateway_epoch)
        return ReportReceipt(self._run_id, unknown, surplus)

    def gateway_started(self, gateway_epochs: AbstractSet[int]) -> None:
        """Of the gateways, only these are there: one of them is new, and what the one before it had linked is not linked any more.

        Where no other one watches, it needs its first minute: what nodes could not reach is not held against them.
        """
        now_ms = self._steady_ms()
        at_ms = self._reported_at_ms_by_gateway = {
            epoch: at for epoch, at in self._reported_at_ms_by_gateway.items() if epoch in gateway_epochs
        }
        if all(uptime.went_unwatched(reported_at_ms, now_ms) for reported_at_ms in at_ms.values()):
            self._uptime = uptime.start(now_ms)
        unlinked = [node_id for node_id, live in self._live.items() if live.gateway_epoch not in gateway_epochs]
        self._links_ended = self._links_ended or bool(unlinked)
        self._forget(unlinked)
        self._waiting = {epoch: counts for epoch, counts in self._waiting.items() if epoch in gateway_epochs}

    async def judge_minutes(self) -> None:
        """Books the minutes that have ended. While no gateway reports, nobody watches, and no minute counts."""
        oldest_seconds = self._now() - self._silence_seconds_max
        for epoch, reported_at_ms in self._reported_at_ms_by_gateway.items():
            if uptime.went_unwatched(reported_at_ms, self._steady_ms()):
                self._waiting.pop(epoch, None)
        self._forget([node_id for node_id, live in self._live.items() if live.reported_at_seconds < oldest_seconds])
        self._uptime, self._coverages = uptime.record(self._uptime, self._coverages), []
        if (self._uptime.next_minute + 1) * uptime.MINUTE_MS + uptime.REPORT_DELAY_MS > self._reported_at_ms:
            return
        nodes = await self._store.run(lambda work: work.nodes.list_all())
        enrolled = {node.node_id: node.enrolled_at_unix_ms for node in nodes if node.status is NodeStatus.ACTIVE}
        self._uptime, judged = uptime.close_minutes(self._uptime, enrolled, self._reported_at_ms)
        live, now_ms = tuple(self._live), self._clock.unix_ms()

        def book(work: UnitOfWork) -> None:
            for minute in judged:
                counts = {node_id: _COUNTS[verdict] for node_id, verdict in minute.verdicts.items() if verdict in _COUNTS}
                work.uptime.add(minute.minute // 60, counts)
            work.nodes.saw(live, now_ms)

        await self._store.run(book)

    def _take(self, report: NodeReport, now: float, gateway_epoch: int) -> bool:
        """Whether what a node does now may call for another plan."""
        known = self._live.get(report.node_id)
        if known is not None and known.report.epoch > report.epoch:
            return False
        live = self._live[report.node_id] = self._heard(report, now, gateway_epoch)
        self._used_at |= dict.fromkeys(report.attempt_counts, now)
        return known is None or known.planned_by() != live.planned_by()

    def _heard(self, report: NodeReport, now: float, gateway_epoch: int) -> LiveNode:
        self._said_goodbye.discard(report.node_id)
        known = foreign_bytes_known(self._card_foreign_bytes.get(report.node_id, {}), report.cards)
        self._card_foreign_bytes[report.node_id] = known
        before = self._live.get(report.node_id)
        return LiveNode(report, now, known, gateway_epoch, session_id=None if before is None else before.session_id)

    def _known(self, work: UnitOfWork) -> tuple[PoolFacts, Mapping[NodeId, str], frozenset[NodeId]]:
        """What a plan is made from, who is out, and who is trusted."""
        nodes = work.nodes.list_all()
        # By the last word about each node: an earlier one, of an earlier session above all, holds no more.
        said = [live.report.attempt_counts for live in tuple(self._live.values())]
        attempt_counts = {replica_id: count for counts in said for replica_id, count in counts.items() if count}
        facts = PoolFacts(
            deployments=work.catalogue.deployments(),
            catalogue=work.catalogue.entries(),
            nodes={node.node_id: node_view(node, self._live.get(node.node_id)) for node in nodes if node.status is NodeStatus.ACTIVE},
            said_goodbye=frozenset(self._said_goodbye),
            attempt_counts=attempt_counts,
            used_at=dict(self._used_at),
            waiting_counts=summed(self._waiting.values()),
        )
        outcasts = {node.node_id: node.status_reason for node in nodes if node.status is not NodeStatus.ACTIVE}
        return facts, outcasts, work.nodes.trusted()

    def _forget_uses(self, planner: Planner) -> None:
        """Of replicas that are no more."""
        planned = planner.replicas.keys() | planner.groups.keys()
        self._used_at = {replica_id: at for replica_id, at in self._used_at.items() if replica_id in planned}

    def _desired(self, work: UnitOfWork, wishes: Wishes) -> Mapping[NodeId, DesiredState]:
        before = self._board.snapshot.desired

        def state(node_id: NodeId) -> DesiredState:
            known, engines, peers = before.get(node_id), wishes.engines[node_id], wishes.peers.get(node_id, ())
            if known is not None and (known.engines, known.peers) == (engines, peers):
                return known
            return DesiredState(work.state.advance(StateName.DESIRED_REVISION), engines, peers)

        return {node_id: state(node_id) for node_id in wishes.engines}

    def _record(self, node: EnrolledNode, up_minutes: int, down_minutes: int) -> NodeRecord:
        live = self._live.get(node.node_id)
        now_ms = self._clock.unix_ms()
        return NodeRecord(
            node_id=node.node_id,
            display_name=node.display_name,
            owner_account_id=node.owner_account_id,
            connection=connection_word(node.status, live),
            state=live.report.state if live is not None else NodeState.DRAINING,
            engines=live.report.engines if live is not None else (),
            inventory=node.inventory if live is None else replace(node.inventory, line=live.report.line),
            agent_version=node.agent_version,
            up_minutes=up_minutes,
            down_minutes=down_minutes,
            unknown_minutes=uptime.unknown_minutes(node.enrolled_at_unix_ms, now_ms, up_minutes, down_minutes),
            last_seen_at_unix_ms=now_ms if live is not None else node.last_seen_at_unix_ms,
            cards=live.report.cards if live is not None else (),
            rest_causes=live.report.rest_causes if live is not None else (),
        )

    def _forget(self, node_ids: Sequence[NodeId]) -> None:
        """They are not connected any more."""
        for node_id in node_ids:
            self._live.pop(node_id, None)

    def _now(self) -> float:
        return self._clock.monotonic_seconds()

    def _steady_ms(self) -> int:
        return int(self._steady_offset_ms + self._clock.monotonic_seconds() * 1000)
