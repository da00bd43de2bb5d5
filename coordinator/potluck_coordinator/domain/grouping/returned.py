"""Machines that may have come back as another node while a stage of the node that they were still runs on them.

Decides by the owner, the owner's word for the site, and the address: at one site no two machines share one. Other owners' nodes and other
sites use the same private addresses, and say nothing. In doubt are only stages of groups that broke, and of members that are not back yet
after the directory began anew; where a member stands, its machine is no other node. It must not know what a group needs.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from potluck_coordinator.domain.grouping import life
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_protocol.private_network import address_refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Address, IPv6Address

    from potluck_coordinator.domain.grouping.words import ShardGroup
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.values import AccountId, NodeId

    Place = tuple[AccountId, str, IPv4Address | IPv6Address]


def doubts(
    groups: Iterable[ShardGroup], views: Mapping[NodeId, NodeView], absent_since: Mapping[NodeId, float], now: float
) -> dict[NodeId, str]:
    """The nodes that are to be in no group yet, with why: memory and port there may still be another's."""
    holders: dict[Place | None, list[NodeId]] = {}
    for group in groups:
        for stage in group.stages:
            is_unsure = group.phase is GroupPhase.BROKEN or not _is_connected(views.get(stage.node_id))
            if is_unsure and life.is_held(group, stage.node_id, views, absent_since, now):
                place = stage.owner_account_id, stage.site, ip_address(stage.address)
                holders.setdefault(place, []).append(stage.node_id)
    return {
        node_id: f"it has the address of node {others[0]}, whose stage may still run there"
        for node_id, view in (views.items() if holders else ())
        if (others := [other for other in holders.get(_place(view), []) if other != node_id])
    }


def _is_connected(view: NodeView | None) -> bool:
    return view is not None and view.connected


def _place(view: NodeView) -> Place | None:
    """Where the node is; None of one that no group could use."""
    offer = view.inventory.group_offer
    if offer is None or address_refusal(offer.address):
        return None
    return view.owner_account_id, offer.site, ip_address(offer.address)
