"""What a gateway asks of the directory for itself: leave to serve, the newest snapshot, and where it hands over what it noticed.

Two of the desks of `desks`, whose values these are. It must not know how a call crosses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from potluck_coordinator.desks import GatewayGrant, PoolSnapshot
    from potluck_coordinator.domain.gate_counts import GateCounts
    from potluck_coordinator.domain.lethal import LoneDeath
    from potluck_protocol.culprits import Fingerprint


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

    async def register_gateway(self) -> GatewayGrant:
        """Leave to serve, with a new gateway epoch. Settles, at their last mark, the holds that earlier epochs left open."""
        ...

    async def note_counts(self, counts: GateCounts) -> None:
        """Adds to what the books have of hours and days; told twice it counts twice."""
        ...

    async def watch(self, known_version: int) -> PoolSnapshot:
        """The snapshot as soon as its version differs from known_version, or after 20 s as it stands. 0 answers at once."""
        ...
