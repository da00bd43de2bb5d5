"""What gateways must know: leave to serve (an epoch, and the certificate of the gRPC ports), and the newest snapshot.

Decides what follows from a registration: `gateways` gives the number a new epoch, `ledger` settles what was left open under epochs that are
nobody's any more, and `nodes` forgets what they had linked. It must not know what a gateway does with its leave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from potluck_coordinator.directory.shared_counts import SharedCounts
from potluck_coordinator.directory.view_board import ViewBoard
from potluck_coordinator.pool_desk import GatewayGrant

if TYPE_CHECKING:
    from potluck_coordinator.directory.board import SnapshotBoard
    from potluck_coordinator.directory.certificate_authority import CertificateAuthority
    from potluck_coordinator.directory.gateways import Gateways
    from potluck_coordinator.directory.ledger import LedgerDesk
    from potluck_coordinator.directory.nodes import Nodes
    from potluck_coordinator.domain.gate_counts import GateCounts, OthersCounts
    from potluck_coordinator.pool_snapshot import PoolNews
    from potluck_coordinator.pool_view import GatewayView, PoolView
    from potluck_coordinator.storage.store import Store
    from potluck_protocol.clock import Clock

_log = structlog.get_logger()


class Pool:
    """The `PoolDesk`.

    Args:
        pool_id: this pool's name for itself.
        store: for what gates count.
        board: what gateways follow.
        authority: signs the server's certificate.
        gateways: whose epochs hold.
        ledger: settles what an earlier gateway left open.
        nodes: hears that there is a new gateway.
        fingerprint_key: what gateways hash requests with that engines die of.
        clock: for the certificates' dates, and which day it is.
    """

    def __init__(
        self,
        *,
        pool_id: str,
        store: Store,
        board: SnapshotBoard,
        authority: CertificateAuthority,
        gateways: Gateways,
        ledger: LedgerDesk,
        nodes: Nodes,
        fingerprint_key: bytes,
        clock: Clock,
    ) -> None:
        self._pool_id = pool_id
        self._board = board
        self._authority = authority
        self._gateways = gateways
        self._ledger = ledger
        self._nodes = nodes
        self._fingerprint_key = fingerprint_key
        self._clock = clock
        self._counts = SharedCounts(store, clock)
        self._views = ViewBoard(clock.unix_ms(), lambda: gateways.epochs)

    async def load(self) -> None:
        """Called at the start: settles what gateways left open that the operator does not run any more."""
        await self._gateways.load()
        await self._ledger.settle_orphans()

    async def register_gateway(self, number: int) -> GatewayGrant:
        """As `PoolDesk.register_gateway`."""
        epoch = await self._gateways.register(number)
        settled_count = await self._ledger.settle_orphans()
        self._nodes.gateway_started(self._gateways.epochs)
        _log.info("gateway_registered", number=number, epoch=epoch, orphaned_holds_settled=settled_count)
        server = self._authority.issue_server_certificate(self._clock.unix_ms())
        peer = self._authority.issue_gateway_certificate(epoch, self._clock.unix_ms())
        return GatewayGrant(epoch, self._pool_id, server, peer, self._fingerprint_key, await self._counts.load())

    async def announce_gateway(self, epoch: int, peer_address: str, link_address: str) -> None:
        """As `PoolDesk.announce_gateway`."""
        await self._gateways.announce(epoch, peer_address, link_address)

    async def tell_view(self, epoch: int, view: GatewayView) -> None:
        """As `PoolDesk.tell_view`."""
        self._views.tell(epoch, view)

    async def follow_view(self, epoch: int, known_version: int) -> PoolView:
        """As `PoolDesk.follow_view`."""
        return await self._views.follow(epoch, known_version)

    async def note_counts(self, counts: GateCounts, known_version: int, *, gateway_epoch: int) -> OthersCounts:
        """As `PoolDesk.note_counts`."""
        return await self._counts.note(counts, known_version, gateway_epoch, self._gateways.epochs)

    async def watch(self, known_version: int) -> PoolNews:
        """As `PoolDesk.watch`."""
        return await self._board.wait(known_version)
