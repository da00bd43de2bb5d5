"""The coordinator's gateways as the directory knows them: whose epochs hold, where each is reached, and who is silent.

Decides whose word is taken: of the processes that were ever given a number, the last. The books say who that is, so that a directory that
starts anew, or another one on the same books, says the same. It must not know nodes, money or what a gateway reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from potluck_coordinator.domain.gateways import GatewayRecord, reachable
from potluck_coordinator.storage.state import StateName
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from potluck_coordinator.directory.board import SnapshotBoard
    from potluck_coordinator.storage.store import Store
    from potluck_coordinator.storage.unit_of_work import UnitOfWork
    from potluck_protocol.clock import Clock

_log = structlog.get_logger()


class Gateways:
    """The registered gateways.

    Args:
        store: the books.
        board: where gateways read of each other.
        clock: for silence.
        count: how many the operator runs.
    """

    def __init__(self, store: Store, board: SnapshotBoard, clock: Clock, count: int) -> None:
        self._store = store
        self._board = board
        self._now: Callable[[], float] = clock.monotonic_seconds
        self._count = count
        self._records: dict[int, GatewayRecord] = {}
        """By epoch, as in the books."""
        self._heard_at: dict[int, float] = {}

    @property
    def epochs(self) -> AbstractSet[int]:
        """Of all that are somebody's."""
        return self._records.keys()

    async def load(self) -> None:
        """Called at the start: takes numbers away that the operator does not run any more, and has the others counted as heard of."""

        def read(work: UnitOfWork) -> dict[int, GatewayRecord]:
            if retired_count := work.gateways.retire(self._count):
                _log.info("gateways_retired", gateway_count=retired_count)
            return work.gateways.all()

        self._records = await self._store.run(read)
        self._heard_at = dict.fromkeys(self._records, self._now())
        self.look()

    async def register(self, number: int) -> int:
        """A new epoch for the number; INVALID_REQUEST for one of none of the operator's gateways."""
        if not 0 <= number < self._count:
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"There is no gateway {number}: the coordinator runs {self._count}.")

        def take(work: UnitOfWork) -> tuple[int, dict[int, GatewayRecord]]:
            epoch = work.state.advance(StateName.GATEWAY_EPOCH)
            work.gateways.put(GatewayRecord(number, epoch))
            return epoch, work.gateways.all()

        epoch, self._records = await self._store.run(take)
        self.hear(epoch)
        self.look()
        return epoch

    async def announce(self, epoch: int, peer_address: str, link_address: str) -> None:
        """As `PoolDesk.announce_gateway`."""

        def note(work: UnitOfWork) -> dict[int, GatewayRecord] | None:
            return work.gateways.all() if work.gateways.announce(epoch, peer_address, link_address) else None

        records = await self._store.run(note)
        if records is None:
            raise _replaced(epoch)
        self._records = records
        self.hear(epoch)
        self.look()

    def hear(self, epoch: int) -> None:
        """A gateway says something; raises ALREADY_EXISTS for one whose number another process has."""
        if epoch not in self._records:
            raise _replaced(epoch)
        self._heard_at[epoch] = self._now()

    def look(self) -> None:
        """Tells the gateways whom they may count on, where that has changed. Called every second, too."""
        self._heard_at = {epoch: at for epoch, at in self._heard_at.items() if epoch in self._records}
        known, now_known = self._board.snapshot.gateways, reachable(self._records, self._heard_at, self._now())
        if known == now_known:
            return
        for epoch in known.keys() - now_known.keys():
            _log.warning("gateway_gone", number=known[epoch].number, epoch=epoch, replaced=epoch not in self._records)
        self._board.publish(gateways=now_known)


def _replaced(epoch: int) -> PotluckError:
    return PotluckError(ErrorCode.ALREADY_EXISTS, f"The gateway of epoch {epoch} was replaced: another process serves in its place.")
