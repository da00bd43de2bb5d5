"""Whether this machine takes the place in a group that the coordinator wishes of it.

Decides by the owner's offer alone: without one there is no place, and with one it is at the offered address, towards a leader on a private
network. It must not know who the others are.
"""

from __future__ import annotations

from potluck_protocol.private_network import address_refusal
from potluck_protocol.values import GroupOffer, GroupPlace


def place_refusal(place: GroupPlace | None, offer: GroupOffer | None) -> str:
    """Why the owner's settings forbid the place; empty where they do not, or where there is none."""
    if place is None:
        return ""
    if offer is None:
        return "this node's settings offer it to no group (group_site, group_address)"
    if place.address != offer.address:
        return f"the coordinator would have a group's stage at {place.address}, and this node's settings offer {offer.address}"
    if place.rank == 0 and (place.leader_address, place.leader_port) != (offer.address, offer.port):
        return f"the coordinator would have a group led at {place.leader_address} port {place.leader_port}, which this node does not offer"
    if refusal := address_refusal(place.leader_address):
        return f"the group's leader is at {place.leader_address}, which {refusal}"
    if not 0 <= place.rank < len(place.layer_counts) or len(place.layer_counts) < 2:
        return f"a group of {len(place.layer_counts)} stages has no rank {place.rank}"
    return ""
