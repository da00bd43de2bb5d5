"""Idempotency keys over gateways and restarts: that a key was taken, and what became of its request.

Decides what is written; when a key is free is `domain.idempotency`'s. A claim is committed before its request is run, so that no
coordinator that starts again runs it a second time. It must not know what was asked: it gets hashes, keyed by the gateway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.idempotency import (
    KEY_KEPT_MS,
    KeyRecord,
    KeyState,
    KeyUse,
    Standing,
    as_known_now,
    has_claimed,
    standing,
)

if TYPE_CHECKING:
    from potluck_coordinator.storage.store import Store
    from potluck_coordinator.storage.unit_of_work import UnitOfWork
    from potluck_protocol.clock import Clock

FORGET_SECONDS: Final = 60.0
"""Between two looks for keys whose day is over."""
FORGOTTEN_COUNT_MAX: Final = 1000
"""In one commit, so that it keeps no payment waiting."""


class IdempotencyKeys:
    """The `IdempotencyDesk`.

    Args:
        store: the books.
        clock: for dates.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._forgotten_at: float | None = None

    async def claim(self, use: KeyUse) -> KeyRecord | None:
        """As `IdempotencyDesk.claim`."""
        now_ms = self._clock.unix_ms()

        def write(work: UnitOfWork) -> KeyRecord | None:
            known = work.idempotency.get(use.account_id, use.key_hash)
            if known is not None and not has_claimed(known, use) and standing(known, use, now_ms) is not Standing.FREE:
                return as_known_now(known, work.gateways.epochs())
            work.idempotency.put(KeyRecord(use, KeyState.CLAIMED, 0, now_ms))
            return None

        return await self._store.run(write)

    async def finish(self, use: KeyUse, charge_micro_credits: int) -> None:
        """As `IdempotencyDesk.finish`."""

        def write(work: UnitOfWork) -> None:
            known = work.idempotency.get(use.account_id, use.key_hash)
            if known is not None and has_claimed(known, use):
                work.idempotency.put(KeyRecord(use, KeyState.SPENT, charge_micro_credits, known.claimed_at_unix_ms))

        await self._store.run(write)

    async def release(self, use: KeyUse) -> None:
        """As `IdempotencyDesk.release`."""

        def write(work: UnitOfWork) -> None:
            if has_claimed(work.idempotency.get(use.account_id, use.key_hash), use):
                work.idempotency.remove(use.account_id, use.key_hash)

        await self._store.run(write)

    async def forget_old(self) -> None:
        """Lets go of keys whose day is over. Called every second; looks once a minute, and again while there are more."""
        now = self._clock.monotonic_seconds()
        if self._forgotten_at is not None and now - self._forgotten_at < FORGET_SECONDS:
            return
        claimed_by_ms = self._clock.unix_ms() - KEY_KEPT_MS
        count = await self._store.run(lambda work: work.idempotency.remove_older(claimed_by_ms, FORGOTTEN_COUNT_MAX))
        if count < FORGOTTEN_COUNT_MAX:
            self._forgotten_at = now
