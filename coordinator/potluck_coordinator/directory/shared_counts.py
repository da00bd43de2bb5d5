"""What gateways' gates count, kept in the books and told to each other, so that several gateways let no more in than one would.

Decides who is told what: of keys' days everyone the books' totals, of requests in an account's window and of what keys have under way each
gateway the others'. The books have hours and days; the rest is in this process's memory, and a directory that starts anew has forgotten
what it was told in the last second. It must not know bounds.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.gate_counts import NOTHING_UNDER_WAY, GateCounts, OthersCounts, UnderWay
from potluck_coordinator.domain.quotas import DAY_MS, KeyDay

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from potluck_coordinator.storage.store import Store
    from potluck_coordinator.storage.unit_of_work import UnitOfWork
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import AccountId, KeyPrefix

VERSIONS_PER_MILLISECOND: Final = 1000
"""A directory that starts anew counts versions on from the clock, so that gateways notice."""


class SharedCounts:
    """One directory's.

    Args:
        store: the books.
        clock: for which day it is.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._version = clock.unix_ms() * VERSIONS_PER_MILLISECOND
        self._days: dict[tuple[KeyPrefix, int], tuple[int, KeyDay]] = {}
        """With the version of their last change, oldest first."""
        self._loaded = False
        self._under_way: dict[int, dict[KeyPrefix, UnderWay]] = {}
        """By gateway epoch."""
        self._untold_requests: dict[int, Counter[AccountId]] = {}
        """Of others, by the epoch of the gateway that is still to be told."""
        self._untold_keys: dict[int, set[KeyPrefix]] = {}
        """Of which others have more or less under way, as long."""

    async def load(self) -> GateCounts:
        """What the books have of hours, and of today."""
        day = self._clock.unix_ms() // DAY_MS
        return await self._store.run(lambda work: GateCounts(work.promise.hours(), work.key_days.of(day)))

    async def note(self, counts: GateCounts, known_version: int, gateway_epoch: int, epochs: Collection[int]) -> OthersCounts:
        """Takes what a gateway counted since it was last asked, and tells what it does not know; `epochs` are of all gateways."""

        def write(work: UnitOfWork) -> Mapping[tuple[KeyPrefix, int], KeyDay]:
            for hour, count in counts.promise_hours.items():
                work.promise.add(hour, count)
            for (key_prefix, day), used in counts.key_days.items():
                work.key_days.add(key_prefix, day, used)
            if not self._loaded:
                return work.key_days.of(self._clock.unix_ms() // DAY_MS)
            return {key_day: work.key_days.get(*key_day) for key_day in counts.key_days}

        if counts or not self._loaded:
            self._keep_days(await self._store.run(write))
        self._keep_requests(counts, gateway_epoch, epochs)
        days = {key_day: total for key_day, (version, total) in self._days.items() if version > known_version}
        others = [under_way for epoch, under_way in self._under_way.items() if epoch != gateway_epoch]
        return OthersCounts(
            self._version,
            days,
            dict(self._untold_requests.pop(gateway_epoch, Counter())),
            {key: sum((one[key] for one in others if key in one), NOTHING_UNDER_WAY) for key in self._untold_keys.pop(gateway_epoch, ())},
        )

    def _keep_days(self, totals: Mapping[tuple[KeyPrefix, int], KeyDay]) -> None:
        self._loaded = True
        self._version += 1
        today = self._clock.unix_ms() // DAY_MS
        for key_day, total in totals.items():
            self._days[key_day] = (self._version, total)
        if any(day < today - 1 for _, day in self._days):
            self._days = {(key, day): kept for (key, day), kept in self._days.items() if day >= today - 1}

    def _keep_requests(self, counts: GateCounts, gateway_epoch: int, epochs: Collection[int]) -> None:
        changed = {gateway_epoch: set(counts.under_way)}
        for gone in self._under_way.keys() - epochs:
            changed[gone] = set(self._under_way.pop(gone))
        if counts.under_way:
            own = self._under_way.setdefault(gateway_epoch, {})
            own |= counts.under_way
            for key in [key for key, under_way in own.items() if under_way == NOTHING_UNDER_WAY]:
                del own[key]
        for epoch in epochs:
            for whose, keys in changed.items():
                if keys and whose != epoch:
                    self._untold_keys.setdefault(epoch, set()).update(keys)
            if counts.account_requests and epoch != gateway_epoch:
                self._untold_requests.setdefault(epoch, Counter()).update(counts.account_requests)
        for untold in (self._untold_keys, self._untold_requests):
            for gone in untold.keys() - epochs:
                del untold[gone]
