"""Who may be in a shard group, and who with whom.

Decides by the owners' own settings: the same word for the site, an address of a private network, and trust, which is one owner or two who
name each other. It never takes one side's word for both. What a link is worth is decided here too, for a pair that measured badly is as
little of a group as one without trust. It must not know how much memory anybody has.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from potluck_protocol.private_network import address_refusal
from potluck_protocol.values import NodeState, PeerMeasurement

if TYPE_CHECKING:
    from potluck_coordinator.domain.node_view import NodeView

ROUND_TRIP_MICROSECONDS_MAX: Final = 5_000
"""Every token crosses every boundary between stages: at 5 ms, four stages already cost 20 ms a token."""
BANDWIDTH_BYTES_PER_SECOND_MIN: Final = 12_500_000
"""A line of 100 Mbit/s: a prompt of 2,000 tokens of a 70B model (16 KiB a token at each boundary) takes 2.6 s to cross."""


def node_refusal(view: NodeView, engine_kind: str) -> str:
    """Why the node can be in no group of that engine, whoever else is in it; empty if it can."""
    if not view.connected:
        return "is not connected"
    if view.state is not NodeState.SERVING:
        return f"is {view.state.value}"
    offer = view.inventory.group_offer
    if offer is None:
        return "its owner offers it to no group (group_site and group_address are not set there)"
    if not offer.site:
        return "its owner names no site (group_site)"
    if refusal := address_refusal(offer.address):
        return f"its group address {offer.address} {refusal}"
    if not 0 < offer.port < 65_535:
        return f"its group port {offer.port} leaves no port above it to measure on"
    if engine_kind not in view.inventory.engine_kinds:
        return f"it has no engine of the kind {engine_kind}"
    return ""


def trust_refusal(first: NodeView, second: NodeView) -> str:
    """Why the two may not be in one group, whatever their link is like; empty if they may. Both have passed `node_refusal`.

    The answer is the same in both orders, but for the order of names.
    """
    mine, yours = first.inventory.group_offer, second.inventory.group_offer
    if mine is None or yours is None:
        return "one of them is offered to no group"
    if mine.site != yours.site:
        return f"node {second.node_id} is at another site"
    address, other_address = ip_address(mine.address), ip_address(yours.address)
    if address.version != other_address.version:
        return f"one of it and node {second.node_id} has an IPv4 address, the other one of IPv6"
    if address == other_address:
        return f"node {second.node_id} says that it has the same address"
    if first.owner_account_id == second.owner_account_id:
        return ""
    if second.owner_account_id not in mine.trusted_account_ids:
        return f"its owner does not trust the owner of node {second.node_id} (group_trusts)"
    if first.owner_account_id not in yours.trusted_account_ids:
        return f"the owner of node {second.node_id} does not trust its owner (group_trusts)"
    return ""


def measured_link(first: NodeView, second: NodeView) -> PeerMeasurement | None:
    """What the two measured, the worse of both words where both speak; None before either has.

    One of them dials, and measures both directions; the other one speaks where nobody can dial it.
    """
    words = [word for _, word in _words(first, second)]
    if not words:
        return None
    return max(words, key=lambda word: (bool(word.failure), word.round_trip_microseconds, -word.bandwidth_bytes_per_second))


def _words(first: NodeView, second: NodeView) -> list[tuple[NodeView, PeerMeasurement]]:
    """What each says of the line between them."""
    return [
        (view, view.peer_measurements[other.node_id])
        for view, other in ((first, second), (second, first))
        if other.node_id in view.peer_measurements
    ]


def link_refusal(first: NodeView, second: NodeView) -> str:
    """Why the link between two that may be together is not good enough, or not known to be."""
    link = measured_link(first, second)
    if link is None:
        return f"its link to node {second.node_id} is not measured yet"
    if link.failure:
        said = (f"{word.failure} (says node {view.node_id})" for view, word in _words(first, second) if word.failure)
        return f"it and node {second.node_id} do not reach each other: {'; '.join(said)}"
    if link.round_trip_microseconds > ROUND_TRIP_MICROSECONDS_MAX:
        return (
            f"a round trip to node {second.node_id} takes {link.round_trip_microseconds / 1000:.1f} ms, "
            f"more than {ROUND_TRIP_MICROSECONDS_MAX / 1000:.0f} ms"
        )
    if link.bandwidth_bytes_per_second < BANDWIDTH_BYTES_PER_SECOND_MIN:
        return (
            f"its link to node {second.node_id} carries {link.bandwidth_bytes_per_second / 1e6:.1f} MB/s, "
            f"less than {BANDWIDTH_BYTES_PER_SECOND_MIN / 1e6:.1f} MB/s"
        )
    return ""
