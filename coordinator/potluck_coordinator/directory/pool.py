"""What gateways must know: leave to serve (an epoch, and the certificate of the gRPC ports), and the newest snapshot.

Decides only that a gateway which registers is the one gateway from then on: `ledger` first settles what earlier ones left open, and `nodes`
begins its count of uptime anew. It must not know what a gateway does with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from potluck_coordinator.desks import GatewayGrant
from potluck_coordinator.domain.gate_counts import GateCounts
from potluck_coordinator.domain.quotas import DAY_MS
from potluck_coordinator.storage.state import StateName

if TYPE_CHECKING:
    from potluck_coordinator.desks import PoolSnapshot
    from potluck_coordinator.directory.board import SnapshotBoard
    from potluck_coordinator.directory.certificate_authority import CertificateAuthority
    from potluck_coordinator.directory.ledger import LedgerDesk
    from potluck_coordinator.directory.nodes import Nodes
    from potluck_coordinator.storage.store import Store
    from potluck_coordinator.storage.unit_of_work import UnitOfWork
    from potluck_protocol.clock import Clock

_log = structlog.get_logger()


class Pool:
    """The `PoolDesk`.

    Args:
        pool_id: this pool's name for itself.
        store: for the gateway's epoch.
        board: what gateways follow.
        authority: signs the server's certificate.
        ledger: settles what an earlier gateway left open.
        nodes: hears that there is a new gateway.
        fingerprint_key: what gateways hash requests with that engines die of.
        clock: for the certificate's dates, and which day it is.
    """

    def __init__(
        self,
        *,
        pool_id: str,
        store: Store,
        board: SnapshotBoard,
        authority: CertificateAuthority,
        ledger: LedgerDesk,
        nodes: Nodes,
        fingerprint_key: bytes,
        clock: Clock,
    ) -> None:
        self._pool_id = pool_id
        self._store = store
        self._board = board
        self._authority = authority
        self._ledger = ledger
        self._nodes = nodes
        self._fingerprint_key = fingerprint_key
        self._clock = clock

    async def register_gateway(self) -> GatewayGrant:
        """As `PoolDesk.register_gateway`."""
        epoch = await self._store.run(lambda work: work.state.advance(StateName.GATEWAY_EPOCH))
        settled_count = await self._ledger.settle_orphans(epoch)
        self._nodes.gateway_started()
        _log.info("gateway_registered", epoch=epoch, orphaned_holds_settled=settled_count)
        server = self._authority.issue_server_certificate(self._clock.unix_ms())
        day = self._clock.unix_ms() // DAY_MS
        counts = await self._store.run(lambda work: GateCounts(work.promise.hours(), work.key_days.of(day)))
        return GatewayGrant(epoch, self._pool_id, server, self._fingerprint_key, counts)

    async def note_counts(self, counts: GateCounts) -> None:
        """As `PoolDesk.note_counts`."""

        def note(work: UnitOfWork) -> None:
            for hour, count in counts.promise_hours.items():
                work.promise.add(hour, count)
            for (key_prefix, day), used in counts.key_days.items():
                work.key_days.add(key_prefix, day, used)

        await self._store.run(note)

    async def watch(self, known_version: int) -> PoolSnapshot:
        """As `PoolDesk.watch`."""
        return await self._board.wait(known_version)
