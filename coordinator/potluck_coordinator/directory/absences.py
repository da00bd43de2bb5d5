"""How likely each node goes away this hour, told to the gateways anew every hour.

Decides when the books are looked through, and for which hours: this one of the week and the next. What follows from a node's minutes is
`domain.survival`'s. It must not know plans, links or placements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.survival import HISTORY_HOURS, WEEK_HOURS, hour_of_week, losses_per_second

if TYPE_CHECKING:
    from potluck_coordinator.directory.board import SnapshotBoard
    from potluck_coordinator.storage.store import Store
    from potluck_protocol.clock import Clock

_HOUR_MS: Final = 3_600_000


class Absences:
    """One directory's look ahead.

    Args:
        store: the books.
        board: where gateways read it.
        clock: for the hour.
    """

    def __init__(self, store: Store, board: SnapshotBoard, clock: Clock) -> None:
        self._store = store
        self._board = board
        self._clock = clock
        self._told_hour = -1

    async def foresee(self) -> None:
        """Looks ahead once an hour; called as often as one likes."""
        now_ms = self._clock.unix_ms()
        hour, this_hour = now_ms // _HOUR_MS, hour_of_week(now_ms)
        if hour == self._told_hour:
            return
        hours = (this_hour, (this_hour + 1) % WEEK_HOURS)
        histories = await self._store.run(lambda work: work.uptime.histories(hour - HISTORY_HOURS, hours))
        self._told_hour = hour
        self._board.publish(losses_per_second={node_id: losses_per_second(*history) for node_id, history in histories.items()})
