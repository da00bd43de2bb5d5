"""Which replica answers a request, and why each other one does not.

Decides from one snapshot of the replicas. It must not know how they are reached. The formula is the simple one, load relative to slots; a
better formula changes `score` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from potluck_protocol.values import Endpoint, ModelId, NodeId, ReplicaId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as the gateway sees it now."""

    replica_id: ReplicaId
    node_id: NodeId
    model_id: ModelId
    ready: bool
    slot_count: int
    in_flight_count: int
    """The gateway's own count of attempts there, never the node's word."""
    node_paused: bool
    node_suspect: bool
    link_up: bool
    endpoints: tuple[Endpoint, ...]
    leaving: bool = False
    """It finishes what it is answering, and makes room."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica's part in a decision: the score in shares of its slots taken, or why it could not be chosen."""

    replica_id: ReplicaId
    node_id: NodeId
    score: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision with everything it was made from."""

    chosen: ReplicaView | None
    candidates: tuple[Candidate, ...]

    def explanation(self) -> str:
        """One line for people: how many replicas lost for which reason."""
        counts: dict[str, int] = {}
        for candidate in self.candidates:
            counts[candidate.reason] = counts.get(candidate.reason, 0) + 1
        return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "no node has this model"


def rejection(replica: ReplicaView, endpoint: Endpoint, excluded: frozenset[NodeId]) -> str | None:
    """Why the replica cannot take the request at all, whatever its load; None if it can."""
    if replica.node_id in excluded:
        return "tried before"
    if not replica.link_up:
        return "disconnected"
    if replica.node_suspect:
        return "suspect"
    if replica.node_paused:
        return "paused"
    if replica.leaving:
        return "leaving"
    if not replica.ready:
        return "not ready"
    if endpoint not in replica.endpoints:
        return f"without {endpoint.value}"
    return None


def score(replica: ReplicaView) -> float:
    """The share of its slots that would be taken with this request; lower is better."""
    return (replica.in_flight_count + 1) / replica.slot_count


def place(replicas: Iterable[ReplicaView], endpoint: Endpoint, excluded: frozenset[NodeId], draw: float) -> Placement:
    """Chooses the free replica with the lowest score; `draw` in [0, 1) breaks ties, so that equal nodes share the work."""
    candidates: list[Candidate] = []
    free: list[tuple[float, ReplicaView]] = []
    for replica in replicas:
        reason = rejection(replica, endpoint, excluded)
        if reason is None and replica.in_flight_count >= replica.slot_count:
            reason = "busy"
        if reason is None:
            free.append((score(replica), replica))
        else:
            candidates.append(Candidate(replica.replica_id, replica.node_id, None, reason))
    chosen = _lowest(free, draw)
    candidates += [
        Candidate(replica.replica_id, replica.node_id, points, "chosen" if replica is chosen else "more loaded") for points, replica in free
    ]
    return Placement(chosen, tuple(candidates))


def _lowest(scored: Sequence[tuple[float, ReplicaView]], draw: float) -> ReplicaView | None:
    if not scored:
        return None
    best = min(points for points, _ in scored)
    ties = [replica for points, replica in scored if points == best]
    return ties[int(draw * len(ties))]
