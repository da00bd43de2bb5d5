"""Requests that engines die of, over gateways and restarts.

Decides what is written and what gateways are told; when a request is refused for good is `domain.lethal`'s. All that is kept of a request
is its hash under a key of the pool's, which lies beside the pool's other secrets: with the database alone nobody can even try a guess.
It must not know how a death is noticed.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.domain.lethal import LethalRequest, LoneDeath, after_death, forgotten, has_lapsed
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.private_files import write_private

if TYPE_CHECKING:
    from pathlib import Path

    from potluck_coordinator.directory.board import SnapshotBoard
    from potluck_coordinator.storage.store import Store
    from potluck_coordinator.storage.unit_of_work import UnitOfWork
    from potluck_protocol.clock import Clock
    from potluck_protocol.culprits import Fingerprint

KEY_BYTES: Final = 32

_log = structlog.get_logger()


def load_or_create_key(path: Path) -> bytes:
    """The key of the pool's fingerprints (0600), made at the first start.

    Raises:
        PotluckError: INTERNAL_ERROR for a file that is no such key, or cannot be read.
    """
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(path, secrets.token_bytes(KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise PotluckError(ErrorCode.INTERNAL_ERROR, f"Cannot use {path}: {error.strerror}.") from error
    if len(key) != KEY_BYTES:
        text = f"{path} is damaged. Put it back from a backup, or remove it: then requests that were refused for good may run again."
        raise PotluckError(ErrorCode.INTERNAL_ERROR, text)
    return key


class LethalRequests:
    """The `LethalDesk`.

    Args:
        store: the books.
        board: where gateways read who is suspected and who is refused.
        clock: for dates.
    """

    def __init__(self, store: Store, board: SnapshotBoard, clock: Clock) -> None:
        self._store = store
        self._board = board
        self._clock = clock
        self._known: tuple[LethalRequest, ...] = ()

    async def load(self) -> None:
        """Tells the gateways what earlier runs learned."""
        self._publish(await self._store.run(lambda work: work.lethal_requests.all()))
        await self.forget_old()

    async def forget_old(self) -> None:
        """Lets go of suspects whose time is over. Called every second: where there is none, nothing is read or written."""
        now_ms = self._clock.unix_ms()
        if any(has_lapsed(one, now_ms) for one in self._known):
            self._publish(await self._store.run(lambda work: _kept(work, now_ms)))

    async def report_death(self, death: LoneDeath) -> None:
        """As `LethalDesk.report_death`."""
        now_ms = self._clock.unix_ms()

        def write(work: UnitOfWork) -> tuple[LethalRequest, tuple[LethalRequest, ...]]:
            known = after_death(work.lethal_requests.get(death.fingerprint), death, now_ms)
            work.lethal_requests.put(known)
            return known, _kept(work, now_ms)

        known, everything = await self._store.run(write)
        refused = known.refused_at_unix_ms is not None
        _log.warning("engine_died_of_one_request", request_fingerprint=death.fingerprint.hex(), refused_for_good=refused)
        self._publish(everything)

    async def clear(self, fingerprint: Fingerprint) -> None:
        """As `LethalDesk.clear`."""

        def write(work: UnitOfWork) -> tuple[LethalRequest, ...]:
            known = work.lethal_requests.get(fingerprint)
            if known is not None and known.refused_at_unix_ms is None:
                work.lethal_requests.remove(fingerprint)
            return work.lethal_requests.all()

        self._publish(await self._store.run(write))

    def _publish(self, everything: tuple[LethalRequest, ...]) -> None:
        self._known = everything
        refused = frozenset(one.fingerprint for one in everything if one.refused_at_unix_ms is not None)
        suspects = {one.fingerprint: one.owner_account_id for one in everything if one.refused_at_unix_ms is None}
        self._board.publish(refused_requests=refused, suspect_requests=suspects)


def _kept(work: UnitOfWork, now_ms: int) -> tuple[LethalRequest, ...]:
    """All that stays; the rest is removed."""
    for fingerprint in forgotten(work.lethal_requests.all(), now_ms):
        work.lethal_requests.remove(fingerprint)
    return work.lethal_requests.all()
