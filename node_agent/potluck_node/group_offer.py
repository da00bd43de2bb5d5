"""Whether, and where, this machine may be part of a shard group: what its owner says, made into an offer to the pool.

Decides that the address is this machine's own and of a private network, for what runs between the nodes of a group is neither encrypted nor
authenticated, and what is offered here is what other machines reach. It must not know what a group is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, ip_address

import psutil

from potluck_node.settings import Settings
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.private_network import address_refusal
from potluck_protocol.values import AccountId, GroupOffer


def group_offer(settings: Settings) -> GroupOffer | None:
    """What the owner offers; None where nothing is said about groups.

    Raises:
        PotluckError: INVALID_REQUEST, saying which setting to change.
    """
    if not settings.group_site and not settings.group_address:
        return None
    if not settings.group_site or not settings.group_address:
        missing = "group_address" if settings.group_site else "group_site"
        raise PotluckError(
            ErrorCode.INVALID_REQUEST,
            f"To offer this machine to groups set {missing}, too (--{missing.replace('_', '-')}); to offer nothing, set neither.",
        )
    return GroupOffer(
        site=settings.group_site,
        address=own_private_address(settings.group_address, own_addresses()),
        port=settings.group_port,
        trusted_account_ids=tuple(AccountId(account_id) for account_id in settings.group_trusts),
    )


def own_addresses() -> dict[str, list[str]]:
    """The IP addresses of this machine by interface; those of other families are left out."""
    return {name: [found.address for found in addresses if _is_ip(found.address)] for name, addresses in psutil.net_if_addrs().items()}


def own_private_address(named: str, addresses_by_interface: Mapping[str, Sequence[str]]) -> str:
    """The address that the owner names, or one of the interface that the owner names, IPv4 first; raises PotluckError as `group_offer`."""
    if named in addresses_by_interface:
        usable = [address for address in addresses_by_interface[named] if not address_refusal(address)]
        if usable:
            return min(usable, key=lambda address: (not isinstance(ip_address(address), IPv4Address), address))
        refused = "; ".join(f"{address} {address_refusal(address)}" for address in addresses_by_interface[named]) or "it has no address"
        raise PotluckError(
            ErrorCode.INVALID_REQUEST,
            f"group_address: the interface {named} has no address of a private network ({refused}); see `ip address`.",
        )
    if not _is_ip(named):
        names = ", ".join(sorted(addresses_by_interface))
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"group_address: {named} is neither an IP address nor one of the interfaces {names}.")
    if refusal := address_refusal(named):
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"group_address: {named} {refusal}; see `ip address` for another.")
    own = {ip_address(address) for addresses in addresses_by_interface.values() for address in addresses}
    if ip_address(named) not in own:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"group_address: {named} is not an address of this machine; see `ip address`.")
    return named


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
