"""What a gateway asks of the directory for itself: leave to serve, the newest snapshot, and where it hands over what it noticed.

Two of the desks of `desks`, whose values these are. It must not know how a call crosses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from potluck_coordinator.domain.gate_counts import GateCounts, OthersCounts

if TYPE_CHECKING:
    from potluck_coordinator.domain.lethal import LoneDeath
    from potluck_coordinator.pool_snapshot import PoolNews
    from potluck_coordinator.pool_view import GatewayView, PoolView
    from potluck_protocol.culprits import Fingerprint


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What a gateway serves its ports with, or shows to other gateways. The key lives in memory only."""

    private_key_pem: bytes = field(repr=False)
    certificate_chain_pem: bytes
    ca_certificate_pem: str


@dataclass(frozen=True, slots=True)
class GatewayGrant:
    """What a gateway needs to serve: whose holds are its own, and who it proves to be."""

    epoch: int
    pool_id: str
    server: ServerIdentity
    peer: ServerIdentity
    """What it shows to other gateways."""
    fingerprint_key: bytes = field(default=b"", repr=False)
    """What requests that kill engines are hashed with; empty for one of the gateway's own."""
    gate_counts: GateCounts = field(default_factory=GateCounts)
    """How the default tier's promise was kept, as far as the books go, and what keys used today."""


class LethalDesk(Protocol):
    """Requests that engines die of; what gateways must know of them comes with the snapshot."""

    async def report_death(self, death: LoneDeath) -> None:
        """An engine died while it worked on one request and no other. Told twice it counts once."""
        ...

    async def clear(self, fingerprint: Fingerprint) -> None:
        """A suspect was answered in full; one that is refused already stays so."""
        ...


class PoolDesk(Protocol):
    """What gateways must know."""

    async def register_gateway(self, number: int) -> GatewayGrant:
        """Leave to serve as the gateway of that number, under a new epoch; whoever had the number before may open nothing any more.

        Settles, at their last mark, the open holds of all epochs that are nobody's now. Raises INVALID_REQUEST for a number of none.
        """
        ...

    async def announce_gateway(self, epoch: int, peer_address: str, link_address: str) -> None:
        """Its ports are open: where other gateways reach it, and where nodes do. Raises ALREADY_EXISTS where another has its number."""
        ...

    async def tell_view(self, epoch: int, view: GatewayView) -> None:
        """What other gateways should know of the nodes whose links this one has, in place of what it told last."""
        ...

    async def follow_view(self, epoch: int, known_version: int) -> PoolView:
        """What other gateways told since that version, as soon as there is something, or nothing after 20 s."""
        ...

    async def note_counts(self, counts: GateCounts, known_version: int, *, gateway_epoch: int) -> OthersCounts:
        """Adds to what the books have of hours and days, and tells what other gateways counted; told twice it counts twice.

        known_version is that of the last answer, 0 for none.
        """
        ...

    async def watch(self, known_version: int) -> PoolNews:
        """What is new in the snapshot since that version, as soon as there is anything, or nothing after 20 s. 0 is told everything."""
        ...
