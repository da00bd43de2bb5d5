"""Requests with which engines died, as rows: keyed hashes, and nothing that was asked.

Decides only their form. It must not know when one is refused.
"""

from __future__ import annotations

from sqlmodel import Session, col, delete, select

from potluck_coordinator.domain.lethal import LethalRequest
from potluck_coordinator.storage.tables import LethalRequestRow
from potluck_protocol.culprits import Fingerprint
from potluck_protocol.values import AccountId, AttemptId


class LethalRequestRepository:
    """The `lethal_request` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def all(self) -> tuple[LethalRequest, ...]:
        """All, in the order in which the first engine died of them."""
        rows = self._session.exec(
            select(LethalRequestRow).order_by(col(LethalRequestRow.died_at_unix_ms), col(LethalRequestRow.fingerprint))
        )
        return tuple(_value(row) for row in rows)

    def get(self, fingerprint: Fingerprint) -> LethalRequest | None:
        row = self._session.get(LethalRequestRow, fingerprint.hex())
        return None if row is None else _value(row)

    def put(self, request: LethalRequest) -> None:
        """In the place of what was known of it."""
        self._session.merge(
            LethalRequestRow(
                fingerprint=request.fingerprint.hex(),
                attempt_id=request.attempt_id,
                owner_account_id=request.owner_account_id,
                died_at_unix_ms=request.died_at_unix_ms,
                refused_at_unix_ms=request.refused_at_unix_ms,
            )
        )
        self._session.flush()

    def remove(self, fingerprint: Fingerprint) -> bool:
        """Whether it was there."""
        return bool(self._session.exec(delete(LethalRequestRow).where(col(LethalRequestRow.fingerprint) == fingerprint.hex())).rowcount)


def _value(row: LethalRequestRow) -> LethalRequest:
    return LethalRequest(
        fingerprint=Fingerprint(bytes.fromhex(row.fingerprint)),
        attempt_id=AttemptId(row.attempt_id),
        owner_account_id=AccountId(row.owner_account_id),
        died_at_unix_ms=row.died_at_unix_ms,
        refused_at_unix_ms=row.refused_at_unix_ms,
    )
