"""People's API keys, as rows: hashes, never secrets.

Decides that a key is an operator's while its account is. It must not know how a secret is proved.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlmodel import Session, col, select, update

from potluck_coordinator.desks import KeyRecord
from potluck_coordinator.domain.quotas import KeyQuotas
from potluck_coordinator.storage.tables import AccountRow, ApiKeyRow
from potluck_protocol.values import AccountId, KeyPrefix


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key with the hash that proves it."""

    record: KeyRecord
    secret_sha256: str


class KeyRepository:
    """The `api_key` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, record: KeyRecord, secret_sha256: str) -> None:
        self._session.add(
            ApiKeyRow(
                key_prefix=record.key_prefix,
                account_id=record.account_id,
                name=record.name,
                secret_sha256=secret_sha256,
                created_at_unix_ms=record.created_at_unix_ms,
                expires_at_unix_ms=record.expires_at_unix_ms,
                revoked=record.revoked,
                requests_per_day=record.quotas.requests_per_day,
                tokens_per_day=record.quotas.tokens_per_day,
                concurrent_max=record.quotas.concurrent_max,
                spend_per_day=record.quotas.spend_micro_credits_per_day,
            )
        )
        self._session.flush()

    def get(self, key_prefix: KeyPrefix) -> StoredKey | None:
        found = self._session.exec(
            select(ApiKeyRow, AccountRow.operator).join(AccountRow).where(ApiKeyRow.key_prefix == key_prefix)
        ).first()
        return None if found is None else StoredKey(_record(found[0], operator=found[1]), found[0].secret_sha256)

    def list_of(self, account_id: AccountId) -> tuple[KeyRecord, ...]:
        """One person's keys, oldest first."""
        found = self._session.exec(
            select(ApiKeyRow, AccountRow.operator)
            .join(AccountRow)
            .where(ApiKeyRow.account_id == account_id)
            .order_by(col(ApiKeyRow.created_at_unix_ms), col(ApiKeyRow.key_prefix))
        )
        return tuple(_record(row, operator=operator) for row, operator in found)

    def set_quotas(self, key_prefix: KeyPrefix, quotas: KeyQuotas) -> None:
        """Replaces all four."""
        self._session.exec(
            update(ApiKeyRow)
            .where(col(ApiKeyRow.key_prefix) == key_prefix)
            .values(
                requests_per_day=quotas.requests_per_day,
                tokens_per_day=quotas.tokens_per_day,
                concurrent_max=quotas.concurrent_max,
                spend_per_day=quotas.spend_micro_credits_per_day,
            )
        )

    def revoke(self, key_prefix: KeyPrefix) -> bool:
        """False where it was revoked before, or never was."""
        statement = update(ApiKeyRow).where(col(ApiKeyRow.key_prefix) == key_prefix, ~col(ApiKeyRow.revoked)).values(revoked=True)
        return self._session.exec(statement).rowcount == 1


def _record(row: ApiKeyRow, *, operator: bool) -> KeyRecord:
    return KeyRecord(
        key_prefix=KeyPrefix(row.key_prefix),
        account_id=AccountId(row.account_id),
        name=row.name,
        created_at_unix_ms=row.created_at_unix_ms,
        expires_at_unix_ms=row.expires_at_unix_ms,
        revoked=row.revoked,
        operator=operator,
        quotas=KeyQuotas(row.requests_per_day, row.tokens_per_day, row.concurrent_max, row.spend_per_day),
    )
