"""The other gateways of this coordinator: a link to each, and what their nodes can do.

Decides which of two gateways' words counts for a node that both name: the one of its later session. What a gateway said last holds until it
says something else, or is gone: named no more by the directory, and its link down. A directory that heard nobody for a while names nobody,
and streams between gateways that are well do not notice. It must not know how a request is placed or sent.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.gateway.peer_link import PeerLink
from potluck_coordinator.gateway.remote_node import RemoteNode, Way
from potluck_coordinator.pool_view import SharedReplica, gateway_view
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import GoodbyeReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from potluck_coordinator.domain.gateways import GatewayRecord
    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.pool_desk import PoolDesk, ServerIdentity
    from potluck_coordinator.pool_view import GatewayView, PoolView
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import NodeId

TELL_AGAIN_SECONDS: Final = 2.0
"""A directory that began anew knows nothing, and ages are as old as what was told."""
FOLLOW_SECONDS: Final = 0.25

_log = structlog.get_logger()


class _Peer:
    """One other gateway."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.way = Way()
        self.link: PeerLink | None = None
        self.view: GatewayView | None = None
        self.replicas: list[SharedReplica] = []
        """As of its view, in its rows' order."""
        self.rows: dict[NodeId, list[int]] = {}
        """Of each node the numbers of its replicas' rows."""
        self.nodes: dict[NodeId, RemoteNode] = {}


class Peers:
    """The others.

    Args:
        epoch: of this gateway.
        identity: by which the others know it.
        links: the nodes; gets the remote ones.
        clock: for the ages of what is told.
        on_change: called when there may be new room.
    """

    def __init__(self, epoch: int, identity: ServerIdentity, links: Links, clock: Clock, on_change: Callable[[], None]) -> None:
        self._epoch = epoch
        self._identity = identity
        self._links = links
        self._clock = clock
        self._on_change = on_change
        self._peers: dict[int, _Peer] = {}
        self._told: GatewayView | None = None
        self._told_at = 0.0
        self.starts_seen: dict[int, int] = {}
        """Of the attempts that other gateways sent here over their newest links, those that have arrived."""

    def __len__(self) -> int:
        return len(self._peers)

    def has_met(self, gateways: Mapping[int, GatewayRecord]) -> bool:
        """Whether there is a link to each of the others among them, and a word of its nodes."""
        others = [epoch for epoch, record in gateways.items() if epoch != self._epoch and record.peer_address]
        met = (self._peers.get(epoch) for epoch in others)
        return all(peer is not None and peer.way.outbox is not None and peer.view is not None for peer in met)

    async def meet(self, gateways: Mapping[int, GatewayRecord]) -> None:
        """Links to whoever is new among them, and lets go of whoever is gone."""
        others = {epoch: record.peer_address for epoch, record in gateways.items() if epoch != self._epoch and record.peer_address}
        for epoch in self._peers.keys() - others.keys():
            if self._peers[epoch].way.outbox is None:
                await self._part(epoch)
        for epoch in others.keys() - self._peers.keys():
            peer = self._peers[epoch] = _Peer(others[epoch])
            peer.link = PeerLink(
                epoch=epoch,
                address=peer.address,
                identity=self._identity,
                way=peer.way,
                clock=self._clock,
                on_change=partial(self._way_changed, peer),
            )

    async def stop(self) -> None:
        """Ends all links."""
        for epoch in tuple(self._peers):
            await self._part(epoch)

    async def tell(self, desk: PoolDesk) -> None:
        """Hands on what other gateways should know of this one's nodes, if that is news or was told long ago."""
        if not self._peers:
            return
        view, now = self._own_view(), self._clock.monotonic_seconds()
        is_known = self._told is not None and view.says_the_same(self._told)
        if not is_known or now - self._told_at >= TELL_AGAIN_SECONDS:
            await desk.tell_view(self._epoch, view)
            self._told, self._told_at = view, now

    async def follow(self, desk: PoolDesk) -> None:
        """Reads what the others say, for ever; while the directory is away, the last word holds."""
        version = 0
        while True:
            try:
                view = await desk.follow_view(self._epoch, version)
            except PotluckError as error:
                _log.warning("view_not_followed", code=error.code)
            else:
                version = view.version
                self.take(view)
            # Also after good news: whoever says something four times a second is not read more often.
            await asyncio.sleep(FOLLOW_SECONDS)

    def _own_view(self) -> GatewayView:
        now, roster, sessions = self._clock.monotonic_seconds(), self._links.roster(), self._links.sessions
        shared = (SharedReplica(view, session.epoch) for session in sessions for view in roster.replicas_of(session.node_id))
        return gateway_view(shared, self.starts_seen, now)

    def take(self, view: PoolView) -> None:
        """What all gateways said last. Of one that it does not name the last word holds."""
        for epoch, told in view.gateways.items():
            peer = self._peers.get(epoch)
            if peer is not None and told is not peer.view:
                self._hear(peer, told)
        self._gather()
        self._on_change()

    def _hear(self, peer: _Peer, told: GatewayView) -> None:
        now = self._clock.monotonic_seconds()
        changed = told.changed_since(peer.view)
        peer.view, peer.way.starts_seen = told, told.starts_seen.get(self._epoch, 0)
        if len(changed) == len(told):
            peer.replicas, peer.rows = told.replicas(now), {}
            for number, (_, node_id) in enumerate(told.names):
                peer.rows.setdefault(node_id, []).append(number)
            touched = peer.rows.keys() | peer.nodes.keys()
        else:
            for number, replica in zip(changed, told.replicas(now, changed), strict=True):
                peer.replicas[number] = replica
            # The others are as they were: of thousands, looking at each would take longer than the time between two views.
            touched = {told.names[number][1] for number in changed} | {one.node_id for one in peer.nodes.values() if one.was_used}
        for node_id in touched:
            self._tell_node(peer, node_id)
            self._links.node_changed(node_id)

    def _tell_node(self, peer: _Peer, node_id: NodeId) -> None:
        """What its gateway says now of a node, which may be nothing."""
        said = [peer.replicas[number] for number in peer.rows.get(node_id, ())]
        if not said:
            peer.nodes.pop(node_id, None)
            return
        epoch, node = said[0].epoch, peer.nodes.get(node_id)
        own = self._links.session(node_id)
        if own is not None and own.epoch < epoch:
            # It has left this gateway without a word.
            self._links.close(own, None, GoodbyeReason.REPLACED, "Another gateway has a newer link of this node.")
        if node is None or node.epoch != epoch:
            node = peer.nodes[node_id] = RemoteNode(node_id, epoch, peer.way, self._links.measures)
        node.tell({shared.view.replica_id: shared.view for shared in said if shared.epoch == epoch})

    def _gather(self) -> None:
        """All remote nodes; of one that two gateways name, by its later session."""
        remote: dict[NodeId, RemoteNode] = {}
        for peer in self._peers.values():
            for node_id, node in peer.nodes.items():
                known = remote.get(node_id)
                if known is None or known.epoch < node.epoch:
                    remote[node_id] = node
        for node_id in self._links.remote.keys() - remote.keys():
            self._links.node_changed(node_id)
        self._links.remote = remote

    async def _part(self, epoch: int) -> None:
        peer = self._peers.pop(epoch)
        if peer.link is not None:
            await peer.link.stop()
        self._gather()

    def _way_changed(self, peer: _Peer) -> None:
        for node_id in peer.nodes:
            self._links.node_changed(node_id)
        self._on_change()
