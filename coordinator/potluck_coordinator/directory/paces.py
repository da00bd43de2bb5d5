"""Which replicas are slower than they used to be, told to the gateways whenever that changes.

Decides what a minute's speed is (the median of what was reported in it), and when a day is written down: every ten minutes, so that a
restart costs no more of the day. A pace is not written down: a drain is short, and three minutes find it again. What is usual and what is
slow is `domain.slowness`'s. It must not know plans or placements.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.domain.slowness import (
    DAYS_MAX,
    SLOW_WEIGHT,
    Pace,
    PaceBook,
    after_minute,
    day_median,
    day_of,
    pace_words,
)
from potluck_protocol.values import ModelId, NodeId

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from potluck_coordinator.directory.board import SnapshotBoard
    from potluck_coordinator.node_reports import NodeReport
    from potluck_coordinator.storage.store import Store
    from potluck_coordinator.storage.unit_of_work import UnitOfWork
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import ReplicaId

_log = structlog.get_logger()

_Key = tuple[NodeId, ModelId]
MINUTE_MS: Final = 60_000
KEPT_MINUTES: Final = 10
"""Between two times that today's medians are written down."""
SAMPLES_MAX: Final = 120
"""Of one minute and replica; a gateway reports each second."""


class Paces:
    """One directory's judgement of speeds.

    Args:
        store: the books.
        board: where gateways read it.
        clock: for the minute.
    """

    def __init__(self, store: Store, board: SnapshotBoard, clock: Clock) -> None:
        self._store = store
        self._board = board
        self._clock = clock
        self._books: dict[_Key, PaceBook] = {}
        self._replica_ids: dict[_Key, ReplicaId] = {}
        self._samples: dict[_Key, list[float]] = {}
        self._minute = clock.unix_ms() // MINUTE_MS
        self._kept_at_minute = self._minute
        self._is_loaded = False

    def take(self, reports: Iterable[NodeReport]) -> None:
        """Notes what gateways measured since their last report."""
        for report in reports:
            models = {status.replica_id: status.model_id for status in report.engines}
            for replica_id, tokens_per_second in report.decode_tokens_per_second.items():
                if replica_id not in models or tokens_per_second <= 0:
                    continue
                key = report.node_id, models[replica_id]
                self._replica_ids[key] = replica_id
                samples = self._samples.setdefault(key, [])
                if len(samples) < SAMPLES_MAX:
                    samples.append(tokens_per_second)

    async def judge_minute(self) -> None:
        """Judges the minute that has ended, if one has; called every second."""
        minute = self._clock.unix_ms() // MINUTE_MS
        if minute <= self._minute:
            return
        if not self._is_loaded:
            await self._load()
        ended, self._minute = self._minute, minute
        samples, self._samples = self._samples, {}
        for key in self._books.keys() | samples.keys():
            before = self._books.get(key, PaceBook(today=day_of(ended)))
            speed = median(samples[key]) if samples.get(key) else None
            after = self._books[key] = after_minute(before, ended, speed)
            if after.pace is not before.pace:
                words = pace_words(after)
                _log.warning("replica_pace_changed", node_id=key[0], model_id=key[1], before=before.pace, now=after.pace, reason=words)
        self._tell()
        if minute - self._kept_at_minute >= KEPT_MINUTES or day_of(minute) != day_of(ended):
            self._kept_at_minute = minute
            await self._store.run(self._keep)
            # One that is drained ends its ten minutes, though at midnight the last day that said what is usual may have gone.
            self._books = {key: book for key, book in self._books.items() if book.days or book.minutes or book.pace is Pace.DRAINED}

    async def _load(self) -> None:
        """Reads the days of earlier runs, before the first minute is judged."""
        today = day_of(self._minute)
        known = await self._store.run(lambda work: work.paces.since(today - DAYS_MAX))
        self._books = {key: PaceBook(days=days, today=today) for key, days in known.items()}
        self._is_loaded = True

    def _tell(self) -> None:
        told = [(self._replica_ids[key], book) for key, book in self._books.items() if key in self._replica_ids]
        slow = {replica_id: SLOW_WEIGHT for replica_id, book in told if book.pace is not Pace.USUAL}
        drained = {replica_id: pace_words(book) for replica_id, book in told if book.pace is Pace.DRAINED}
        before = self._board.snapshot
        if (before.slow_replicas.keys(), before.drained_replicas.keys()) != (slow.keys(), drained.keys()):
            self._board.publish(slow_replicas=slow, drained_replicas=drained)

    def _keep(self, work: UnitOfWork) -> None:
        today = day_of(self._minute)
        enrolled = {node.node_id for node in work.nodes.list_all()}
        for (node_id, model_id), book in self._books.items():
            found: Mapping[int, float | None] = {**book.days, book.today: day_median(book)}
            for day, tokens_per_second in found.items():
                if tokens_per_second is not None and day >= today - 1 and node_id in enrolled:
                    work.paces.put(node_id, model_id, day, tokens_per_second)
        work.paces.forget_before(today - DAYS_MAX)
