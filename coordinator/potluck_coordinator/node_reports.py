"""How a gateway's nodes do, as it tells the directory each second (`desks.NodeDesk.report`), and what it is told in return.

Decides nothing: frozen values that cross processes. They must not know who tells, nor what follows.
"""

from __future__ import annotations

import copyreg
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from potluck_protocol.cards import CardTelemetry
from potluck_protocol.values import EngineStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from potluck_protocol.line import LineMeasurement
    from potluck_protocol.rest import RestCause
    from potluck_protocol.values import NodeId, NodeState, PeerMeasurement, ReplicaId


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node as its gateway saw it since the last report."""

    node_id: NodeId
    epoch: int
    covered_seconds: float
    """Time since the last report during which the lease was fresh."""
    suspect: bool
    state: NodeState
    engines: tuple[EngineStatus, ...]
    attempt_counts: Mapping[ReplicaId, int] = field(default_factory=dict)
    """The gateway's own count of attempts under way; a replica that had some since the last report, and has none now, is named with 0."""
    disk_free_bytes: int = 0
    cards: tuple[CardTelemetry, ...] = ()
    peer_measurements: tuple[PeerMeasurement, ...] = ()
    attached_model_names: tuple[str, ...] = ()
    """Of its latest hello: its owner's engines come and go while the session lasts."""
    line: LineMeasurement | None = None
    """Of its latest heartbeat that had one, or its hello."""
    decode_tokens_per_second: Mapping[ReplicaId, float] = field(default_factory=dict)
    """Of a lone answer, as the gateway measured it; of replicas of which it learned something since the last report."""
    rest_causes: tuple[RestCause, ...] = ()
    """Why it does not serve, as it says."""


@dataclass(frozen=True, slots=True)
class Covered:
    """Nodes of which a gateway has no news, and since it last told of each: seconds in which their leases were fresh. One item for each."""

    node_ids: tuple[NodeId, ...] = ()
    epochs: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()


NOBODY: Final = Covered()


@dataclass(frozen=True, slots=True)
class ReportReceipt:
    """The directory's answer to a report."""

    run_id: str = ""
    """Of this process of the directory: another one than the last time knows nobody."""
    unknown: frozenset[NodeId] = frozenset()
    """Of those without news: who has to be told of in full."""
    surplus_count: int = 0
    """How many of its idle nodes the gateway should let go now, for others have fewer."""


def _by_position(kind: Any) -> Callable[[Any], tuple[Any, tuple[Any, ...]]]:
    values = attrgetter(*(one.name for one in fields(kind)))
    return lambda value: (kind, values(value))


# A dataclass with slots asks itself for its fields anew with each pickle, which took a tenth of a gateway's time at a thousand heartbeats a
# second.
for _kind in (NodeReport, EngineStatus, CardTelemetry):
    copyreg.pickle(_kind, _by_position(_kind))
