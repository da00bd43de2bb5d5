"""Gateways: what is known of each, which of them are silent, and which have more than their share of the nodes.

Decides when a gateway that says nothing counts as gone. Its epoch is its own all the same until its number is given out anew: it may only
be cut off, and what it relays is paid for. It must not know reports, links or tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

SILENCE_SECONDS_MAX: Final = 5.0
"""A gateway reports every second, and a directory that restarts is away for about two."""
SURPLUS_COUNT_MIN: Final = 2
SURPLUS_SHARE_MIN: Final = 0.25
LET_GO_SHARE_PER_SECOND: Final = 0.02
"""Of a gateway's nodes: half of them find another one within half a minute."""


@dataclass(frozen=True, slots=True)
class GatewayRecord:
    """One gateway that has registered."""

    number: int
    """0, 1, ... of as many as the operator runs; the next process of the same number takes this one's place."""
    epoch: int
    """Of this process's registration; no other had it, and a later one's is higher."""
    peer_address: str = ""
    """Where other gateways reach it, as "host:port"; empty until it has announced itself."""
    link_address: str = ""
    """Where nodes reach it; empty for as long."""

    @property
    def is_announced(self) -> bool:
        """Whether its ports are open."""
        return bool(self.link_address)


def link_addresses(records: Mapping[int, GatewayRecord], own_epoch: int) -> tuple[str, ...]:
    """Where a node that is with the gateway of that epoch finds the gateways, its own first; none where there is but one."""
    others = [record.link_address for epoch, record in sorted(records.items()) if epoch != own_epoch]
    return (records[own_epoch].link_address, *others) if others and own_epoch in records else ()


def reachable(records: Mapping[int, GatewayRecord], heard_at_seconds: Mapping[int, float], now_seconds: float) -> dict[int, GatewayRecord]:
    """Those that others may count on now, by epoch: announced, and heard of lately.

    Args:
        records: all that are registered, by epoch.
        heard_at_seconds: when each last said something, by epoch; one that is missing here never did.
        now_seconds: monotonic, as the others.
    """
    return {
        epoch: record
        for epoch, record in records.items()
        if record.is_announced and now_seconds - heard_at_seconds.get(epoch, -SILENCE_SECONDS_MAX) < SILENCE_SECONDS_MAX
    }


def surplus_count(node_counts: Mapping[int, int], epochs: Collection[int], own_epoch: int) -> int:
    """How many of its nodes a gateway should let go within this second, so that they find another one.

    None while it has no more than its share and a quarter, or only one node too many: nodes come and go. Never more than brings it to its
    share, nor so many that those who take them would notice.

    Args:
        node_counts: of the gateways that have any, by epoch.
        epochs: of those that nodes can go to.
        own_epoch: whose surplus it is.
    """
    if own_epoch not in epochs or len(epochs) < 2:
        return 0
    own_count = node_counts.get(own_epoch, 0)
    share = sum(node_counts.get(epoch, 0) for epoch in epochs) / len(epochs)
    excess = own_count - share
    if excess < max(SURPLUS_COUNT_MIN, SURPLUS_SHARE_MIN * share):
        return 0
    return min(int(excess), max(1, int(own_count * LET_GO_SHARE_PER_SECOND)))
