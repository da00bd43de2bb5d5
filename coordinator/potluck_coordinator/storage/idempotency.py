"""Idempotency keys, as rows: keyed hashes, and nothing that was asked or answered.

Decides only their form. It must not know what a second use of a key gets.
"""

from __future__ import annotations

from sqlmodel import Session, col, delete, select

from potluck_coordinator.domain.idempotency import KeyRecord, KeyState, KeyUse
from potluck_coordinator.storage.tables import IdempotencyKeyRow
from potluck_protocol.values import AccountId, RequestId


class IdempotencyRepository:
    """The `idempotency_key` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, account_id: AccountId, key_hash: bytes) -> KeyRecord | None:
        row = self._session.get(IdempotencyKeyRow, (account_id, key_hash.hex()))
        return None if row is None else _value(row)

    def put(self, record: KeyRecord) -> None:
        """In the place of what was known of the key."""
        use = record.use
        self._session.merge(
            IdempotencyKeyRow(
                account_id=use.account_id,
                key_hash=use.key_hash.hex(),
                body_hash=use.body_hash.hex(),
                request_id=use.request_id,
                claim_id=use.claim_id,
                gateway_epoch=use.gateway_epoch,
                state=record.state,
                charge=record.charge_micro_credits,
                claimed_at_unix_ms=record.claimed_at_unix_ms,
            )
        )
        self._session.flush()

    def remove(self, account_id: AccountId, key_hash: bytes) -> None:
        row = IdempotencyKeyRow
        self._session.exec(delete(row).where(col(row.account_id) == account_id, col(row.key_hash) == key_hash.hex()))

    def remove_older(self, claimed_by_unix_ms: int, count_max: int) -> int:
        """Removes some of those that were claimed by then, the oldest first; how many."""
        row = IdempotencyKeyRow
        found = self._session.exec(
            select(row.account_id, row.key_hash)
            .where(col(row.claimed_at_unix_ms) <= claimed_by_unix_ms)
            .order_by(col(row.claimed_at_unix_ms))
            .limit(count_max)
        ).all()
        for account_id, key_hash in found:
            self._session.exec(delete(row).where(col(row.account_id) == account_id, col(row.key_hash) == key_hash))
        return len(found)


def _value(row: IdempotencyKeyRow) -> KeyRecord:
    use = KeyUse(
        account_id=AccountId(row.account_id),
        key_hash=bytes.fromhex(row.key_hash),
        body_hash=bytes.fromhex(row.body_hash),
        request_id=RequestId(row.request_id),
        claim_id=row.claim_id,
        gateway_epoch=row.gateway_epoch,
    )
    return KeyRecord(use, KeyState(row.state), row.charge, row.claimed_at_unix_ms)
