"""One node whose link another gateway has, as this one uses it: what it can do, and the attempts of this gateway there.

Decides how the other gateway's view, which is a moment old, is brought up to date by what was sent there since. Its stalls, its lease and
what is held against it are the other gateway's affair, which tells how each attempt ends. It must not know frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_coordinator.gateway.forward_outbox import ForwardOutbox
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.measures import Measures
    from potluck_coordinator.gateway.node_session import NodeSession
    from potluck_coordinator.gateway.relay import Relay
    from potluck_protocol.values import AccountId, AttemptId, ModelId, NodeId, ReplicaId, StartAttempt

Host: TypeAlias = "NodeSession | RemoteNode"
"""By which attempts are started on a node, whoever has its link."""


class Way:
    """The link to the gateway that has the node: as long as there is one, its outbox.

    All nodes of one gateway share it.
    """

    def __init__(self) -> None:
        self.outbox: ForwardOutbox | None = None
        self.relays: dict[AttemptId, Relay] = {}
        """Of the attempts on their way there, whichever node they are on."""
        self.nodes: dict[AttemptId, RemoteNode] = {}
        """On which."""
        self.starts_seen = 0
        """Of the attempts sent over it, those that the newest view counts already."""


class RemoteNode:
    """One node of another gateway's.

    Args:
        node_id: whose.
        epoch: of its session there.
        way: to its gateway.
        measures: what is learned here of its replicas.
    """

    def __init__(self, node_id: NodeId, epoch: int, way: Way, measures: Measures) -> None:
        self.node_id = node_id
        self.epoch = epoch
        self._way = way
        self._measures = measures
        self._replicas: dict[ReplicaId, ReplicaView] = {}
        self._sent: dict[AttemptId, ReplicaId] = {}
        """Attempts of this gateway's there, and on which replica."""
        self._full: set[ReplicaId] = set()
        """Those that had no room in spite of the newest view."""

    @property
    def way(self) -> Way:
        """To the gateway that has its link."""
        return self._way

    @property
    def owner_account_id(self) -> AccountId:
        """Who is credited for what it answers, unless it answers together with others."""
        return next(iter(self._replicas.values())).owner_account_id

    @property
    def attempts(self) -> int:
        """How many are under way there, as far as this gateway knows."""
        return sum(view.in_flight_count for view in self.replica_views())

    @property
    def was_used(self) -> bool:
        """Whether a new view may change what is seen of it, though its own part in it is as it was."""
        return bool(self._full or self._sent)

    def tell(self, replicas: Mapping[ReplicaId, ReplicaView]) -> None:
        """What its gateway said last of each of its replicas, at least one; that one of them was full is taken back."""
        self._full = set()
        self._replicas = {replica_id: view._replace(is_remote=True) for replica_id, view in replicas.items()}

    def refused(self, attempt_id: AttemptId) -> None:
        """Its gateway had no room for the attempt there: nothing more is sent to the replica before the next view."""
        if attempt_id in self._sent:
            self._full.add(self._sent[attempt_id])

    def replica_views(self, model_id: ModelId | None = None) -> Iterator[ReplicaView]:
        """Its replicas, of one model or all, as placement sees them."""
        for view in self._replicas.values():
            if model_id in {None, view.model_id}:
                yield self._now(view)

    def start(
        self, start: StartAttempt, relay: Relay, now: float, request: InferenceRequest, tried: frozenset[NodeId] = frozenset()
    ) -> None:
        """Sends an attempt to its gateway; raises NO_CAPACITY if the way there has just gone."""
        del now
        outbox = self._way.outbox
        if outbox is None:
            raise PotluckError(ErrorCode.NO_CAPACITY, retry_after_seconds=1)
        self._way.relays[start.attempt_id], self._way.nodes[start.attempt_id] = relay, self
        outbox.start(start, self.node_id, request, tried)
        self._sent[start.attempt_id] = start.replica_id
        self._measures.begin(start.replica_id, start.attempt_id, request, relay)

    def finish(self, attempt_id: AttemptId, replica_id: ReplicaId) -> None:
        """Forgets an attempt, and has it ended there. Again is harmless."""
        del replica_id
        if self._sent.pop(attempt_id, None) is None:
            return
        del self._way.relays[attempt_id], self._way.nodes[attempt_id]
        counted = self._measures.counted(attempt_id)
        self._measures.end(attempt_id)
        if self._way.outbox is not None:
            self._way.outbox.finish(attempt_id, counted)

    def acknowledge(self, attempt_id: AttemptId, next_sequence: int) -> None:
        """Tells its gateway what has left for the client."""
        if self._way.outbox is not None:
            self._way.outbox.acknowledge(attempt_id, next_sequence)

    def _now(self, view: ReplicaView) -> ReplicaView:
        """With the attempts that were sent there since the view was made."""
        new = [self._measures.work_of(attempt_id) for attempt_id in self._new_at(view.replica_id)]
        link_up = view.link_up and self._way.outbox is not None
        if view.replica_id in self._full:
            view = view._replace(in_flight_count=max(view.in_flight_count, view.slot_count))
        if not new:
            return view if link_up is view.link_up else view._replace(link_up=link_up)
        tokens = sum(work.tokens for work in new)
        return view._replace(
            link_up=link_up,
            in_flight_count=view.in_flight_count + len(new),
            committed_tokens=view.committed_tokens + tokens,
            dispatched_tokens=view.dispatched_tokens + tokens,
            prefill_backlog_tokens=view.prefill_backlog_tokens + sum(work.prompt_tokens for work in new),
            prefill_since_seconds=view.prefill_since_seconds or self._measures.now(),
        )

    def _new_at(self, replica_id: ReplicaId) -> list[AttemptId]:
        outbox, seen = self._way.outbox, self._way.starts_seen
        sent = (attempt_id for attempt_id, where in self._sent.items() if where == replica_id)
        return [attempt_id for attempt_id in sent if outbox is None or not outbox.is_among(attempt_id, seen)]
