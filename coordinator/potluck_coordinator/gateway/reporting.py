"""What the directory is told of this gateway's nodes each second: of whom there is news, all of it; of the others how long they were there.

Decides who is due. A node that is at work, suspect or without a link is told of each second; one of which nothing changes is named a few
times a lease with its seconds, so that thousands that only beat cost next to nothing. A directory that is another one than the last time
knows nobody, and is told of everybody at once. It must not know what the directory does with any of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.node_reports import Covered, NodeReport
from potluck_protocol.errors import PotluckError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from potluck_coordinator.desks import DirectoryPort
    from potluck_coordinator.gateway.node_session import NodeSession
    from potluck_protocol.values import ModelId, ReplicaId

COVERS_PER_LEASE: Final = 3
"""How often a node of which there is no news is named: after a whole lease without a word the directory takes it for gone."""


class Reporting:
    """One gateway's.

    Args:
        directory: is told.
        lease_seconds: of its nodes.
    """

    def __init__(self, directory: DirectoryPort, lease_seconds: float) -> None:
        self._directory = directory
        self._cover_seconds = lease_seconds / COVERS_PER_LEASE
        self._told_run_id = ""

    async def report(self, sessions: Collection[NodeSession], waiting_counts: Mapping[ModelId, int], now: float, gateway_epoch: int) -> int:
        """Tells what is due, and gives how many nodes should go elsewhere. Of nobody, too: that says that somebody is watching.

        Raises PotluckError: then it is all told again.
        """
        told = [session for session in sessions if session.telling.has_news or session.telling.report_at <= now]
        changed = [session for session in told if session.telling.has_news or is_watched(session)]
        unchanged = [session for session in told if not session.telling.has_news and not is_watched(session)]
        for session in told:
            session.cover(now)
        reports = [report_of(session, now) for session in changed]
        covered = Covered(
            tuple(session.node_id for session in unchanged),
            tuple(session.epoch for session in unchanged),
            tuple(session.telling.take_seconds() for session in unchanged),
        )
        for session in told:
            session.telling.has_news = False
            session.telling.report_at = now if is_watched(session) else now + self._cover_seconds
        try:
            receipt = await self._directory.nodes.report(reports, waiting_counts, covered, gateway_epoch=gateway_epoch)
        except PotluckError:
            seconds = (*(report.covered_seconds for report in reports), *covered.seconds)
            for session, covered_seconds in zip((*changed, *unchanged), seconds, strict=True):
                session.telling.has_news = True
                session.telling.covered_seconds += covered_seconds
            raise
        is_another, self._told_run_id = receipt.run_id != self._told_run_id, receipt.run_id
        told_ids = {report.node_id for report in reports}
        missing = [one for one in sessions if one.node_id in receipt.unknown or (is_another and one.node_id not in told_ids)]
        for session in missing:
            session.telling.has_news = True
        if is_another and missing:
            return await self.report(sessions, waiting_counts, now, gateway_epoch)
        return receipt.surplus_count


def is_watched(session: NodeSession) -> bool:
    """Whether the directory is to hear of it each second."""
    return bool(session.attempts) or session.suspect or session.outbox is None


def report_of(session: NodeSession, now: float) -> NodeReport:
    """What happened since the last report, for the directory's count of uptime and its planning."""
    since, session.telling.reported_at = session.telling.reported_at, now
    machine = session.machine
    report = NodeReport(
        node_id=session.node_id,
        epoch=session.epoch,
        covered_seconds=session.telling.take_seconds(),
        suspect=session.suspect,
        state=session.state,
        engines=tuple(session.engines.values()),
        attempt_counts={replica_id: session.attempts_by_replica.get(replica_id, 0) for replica_id in session.used_replica_ids},
        disk_free_bytes=machine.disk_free_bytes,
        cards=machine.cards,
        peer_measurements=machine.peer_measurements,
        attached_model_names=machine.attached_model_names,
        line=machine.line,
        decode_tokens_per_second=_speeds_learned(session, since),
        rest_causes=machine.rest_causes,
    )
    session.used_replica_ids = {replica_id for replica_id, count in session.attempts_by_replica.items() if count}
    return report


def _speeds_learned(session: NodeSession, since: float) -> Mapping[ReplicaId, float]:
    if session.measures is None:
        return {}
    learned = {replica_id: session.measures.tokens_per_second_since(replica_id, since) for replica_id in session.engines}
    return {replica_id: speed for replica_id, speed in learned.items() if speed is not None}
