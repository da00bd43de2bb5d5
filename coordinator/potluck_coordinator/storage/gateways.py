"""Gateways, as rows: which epoch each number has now, and where it is reached.

Decides nothing. A number has one epoch, and an epoch that no row names is nobody's. It must not know what an epoch allows.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection
from sqlmodel import col, delete, select, update

from potluck_coordinator.domain.gateways import GatewayRecord
from potluck_coordinator.storage.bulk import Insertion, run
from potluck_coordinator.storage.tables import GatewayRow

_PUT: Final = Insertion(
    "gateway",
    {"number": "integer", "epoch": "bigint", "peer_address": "text", "link_address": "text"},
    otherwise="""ON CONFLICT (number) DO UPDATE
    SET epoch = excluded.epoch, peer_address = excluded.peer_address, link_address = excluded.link_address""",
)


class GatewayRepository:
    """The `gateway` table."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def epochs(self) -> frozenset[int]:
        """Of all that are somebody's."""
        return frozenset(epoch for (epoch,) in run(self._connection, "SELECT epoch FROM gateway").fetchall())

    def all(self) -> dict[int, GatewayRecord]:
        """By epoch."""
        row = GatewayRow
        rows = self._connection.execute(select(row.number, row.epoch, row.peer_address, row.link_address).order_by(col(row.number)))
        return {record.epoch: record for record in (GatewayRecord(*values) for values in rows)}

    def put(self, record: GatewayRecord) -> None:
        """In the place of whoever had the number."""
        _PUT.run(self._connection, [(record.number, record.epoch, record.peer_address, record.link_address)])

    def announce(self, epoch: int, peer_address: str, link_address: str) -> bool:
        """Notes where it is reached; False for an epoch that is nobody's any more."""
        values = {"peer_address": peer_address, "link_address": link_address}
        return self._connection.execute(update(GatewayRow).where(col(GatewayRow.epoch) == epoch).values(**values)).rowcount == 1

    def retire(self, from_number: int) -> int:
        """Takes away every gateway of that number or a higher one; how many there were."""
        return self._connection.execute(delete(GatewayRow).where(col(GatewayRow.number) >= from_number)).rowcount
