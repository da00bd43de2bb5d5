"""One node as the directory knows it while it is connected, and what planning and people see of it.

Decides which of a node's words may change a plan at once, and what counts for a node that says nothing. It must not know who keeps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from potluck_coordinator.domain.node_view import NodeView
from potluck_coordinator.domain.planning.node_kinds import cards_of
from potluck_coordinator.node_reports import NodeReport
from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
from potluck_protocol.values import ModelId, NodeState, SessionId


@dataclass(slots=True)
class LiveNode:
    """A connected node: its last report, or what its hello said, and when it was last told of."""

    report: NodeReport
    reported_at_seconds: float
    card_foreign_bytes: Mapping[str, int]
    gateway_epoch: int
    """Of the gateway that has its link."""
    session_id: SessionId | None = None
    """Of its agent's process, as its hello said; None: this directory has not heard it."""

    def planned_by(self) -> object:
        """What of it may change a plan at once."""
        said = self.report
        engines = [
            (status.replica_id, status.state, status.group_generation, status.weight_bytes, status.failure) for status in said.engines
        ]
        return said.epoch, said.state, engines, said.peer_measurements, said.attached_model_names, self.lost_cards

    @property
    def lost_cards(self) -> frozenset[str]:
        """The uuids of cards that its driver no longer reaches."""
        return frozenset(card.uuid for card in self.report.cards if card.lost)


def node_view(node: EnrolledNode, live: LiveNode | None) -> NodeView:
    """An active node for planning; `live` is None while it is not connected."""
    away = NodeView(
        node_id=node.node_id,
        owner_account_id=node.owner_account_id,
        inventory=node.inventory,
        connected=False,
        state=NodeState.DRAINING,
        engines=(),
        peer_measurements={},
        epoch=node.epoch,
    )
    if live is None:
        return away
    said, lost_cards = live.report, live.lost_cards
    cards = tuple(card for card in node.inventory.accelerators if card.uuid not in lost_cards)
    return replace(
        away,
        inventory=replace(node.inventory, accelerators=cards, attached_model_names=said.attached_model_names, line=said.line),
        connected=True,
        state=said.state,
        rest_causes=said.rest_causes,
        engines=said.engines,
        peer_measurements={measured.node_id: measured for measured in said.peer_measurements},
        disk_free_bytes=said.disk_free_bytes,
        card_foreign_bytes=live.card_foreign_bytes,
        cards_lost=bool(cards_of(node.inventory)) and not cards_of(replace(node.inventory, accelerators=cards)),
    )


def moves_here(live: LiveNode | None, session_id: SessionId, gateway_epoch: int) -> bool:
    """Whether an agent that says hello at a gateway has its session at another one: that gateway is gone, and nothing on the node ended."""
    return live is not None and live.session_id == session_id and live.gateway_epoch != gateway_epoch


def still_there(live: LiveNode | None, epoch: int, now: float) -> bool:
    """Notes that the session goes on, of which there is no news; whether it is known."""
    if live is None or live.report.epoch < epoch:
        return False
    if live.report.epoch == epoch:
        live.reported_at_seconds = now
    return True


def connection_word(status: NodeStatus, live: LiveNode | None) -> str:
    """How a node is connected, in a word for people."""
    if status is not NodeStatus.ACTIVE:
        return str(status)
    if live is None:
        return "offline"
    return "suspect" if live.report.suspect else "connected"


def summed(counts: Iterable[Mapping[ModelId, int]]) -> dict[ModelId, int]:
    """What waits at all gateways together, by model."""
    sums: Counter[ModelId] = Counter()
    for of_gateway in counts:
        sums.update(of_gateway)
    return dict(sums)
