"""Which addresses a shard group may use: those of networks that only their owners reach.

Decides for both sides, for neither takes the other's word: the node refuses to listen elsewhere, the coordinator to send anyone there.
What runs between a group's nodes is neither encrypted nor authenticated. It must not know whose the address is.
"""

from __future__ import annotations

import ipaddress
from typing import Final

_PRIVATE: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",  # RFC 1918, as the next two
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",  # RFC 6598: what overlay networks hand out
        "fc00::/7",  # RFC 4193
    )
)
_PRIVATE_WORDS: Final = "10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 100.64.0.0/10 or fc00::/7"


def address_refusal(text: str) -> str:
    """Why a group cannot use the address, in words that follow its name ("is …"); empty for one of a private network."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return "is not an IP address"
    if "%" in text:
        return "names a zone, which only its own machine knows"
    if any(address in network for network in _PRIVATE):
        return ""
    if address.is_loopback:
        return "is loopback, which no other machine reaches"
    if address.is_link_local:
        return "is link-local: it may change at any time, and other machines cannot name it alone"
    if address.is_unspecified or address.is_multicast or (address.version == 4 and address.is_reserved):
        return "is not the address of one machine"
    return f"is public: a group's own traffic is neither encrypted nor authenticated, so it stays within {_PRIVATE_WORDS}"
