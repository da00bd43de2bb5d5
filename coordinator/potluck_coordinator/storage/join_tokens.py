"""Join tokens, as rows: hashes, never secrets.

Decides, in one statement, that a good token is spent once, on one node. It must not know how a secret is proved.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlmodel import Session, col, select, update

from potluck_coordinator.desks import JoinTokenRecord
from potluck_coordinator.storage.tables import JoinTokenRow
from potluck_protocol.values import AccountId, NodeId, TokenId


@dataclass(frozen=True, slots=True)
class StoredJoinToken:
    """A token with the hash that proves it."""

    record: JoinTokenRecord
    secret_sha256: str


class JoinTokenRepository:
    """The `join_token` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, record: JoinTokenRecord, secret_sha256: str) -> None:
        self._session.add(
            JoinTokenRow(
                token_id=record.token_id,
                account_id=record.account_id,
                secret_sha256=secret_sha256,
                created_at_unix_ms=record.created_at_unix_ms,
                expires_at_unix_ms=record.expires_at_unix_ms,
                used_by_node_id=record.used_by_node_id,
                revoked=record.revoked,
            )
        )
        self._session.flush()

    def get(self, token_id: TokenId) -> StoredJoinToken | None:
        row = self._session.get(JoinTokenRow, token_id)
        return None if row is None else StoredJoinToken(_record(row), row.secret_sha256)

    def list_of(self, account_id: AccountId) -> tuple[JoinTokenRecord, ...]:
        """One person's tokens, oldest first."""
        rows = self._session.exec(
            select(JoinTokenRow)
            .where(JoinTokenRow.account_id == account_id)
            .order_by(col(JoinTokenRow.created_at_unix_ms), col(JoinTokenRow.token_id))
        )
        return tuple(_record(row) for row in rows)

    def spend(self, token_id: TokenId, node_id: NodeId, now_unix_ms: int) -> bool:
        """Gives the token to the node if it is still free and good; of any number of callers one is told True."""
        statement = (
            update(JoinTokenRow)
            .where(
                col(JoinTokenRow.token_id) == token_id,
                col(JoinTokenRow.used_by_node_id).is_(None),
                ~col(JoinTokenRow.revoked),
                col(JoinTokenRow.expires_at_unix_ms) > now_unix_ms,
            )
            .values(used_by_node_id=node_id)
        )
        return self._session.exec(statement).rowcount == 1

    def revoke(self, token_id: TokenId) -> bool:
        """False where it was revoked before, or never was."""
        statement = update(JoinTokenRow).where(col(JoinTokenRow.token_id) == token_id, ~col(JoinTokenRow.revoked)).values(revoked=True)
        return self._session.exec(statement).rowcount == 1


def _record(row: JoinTokenRow) -> JoinTokenRecord:
    return JoinTokenRecord(
        token_id=TokenId(row.token_id),
        account_id=AccountId(row.account_id),
        created_at_unix_ms=row.created_at_unix_ms,
        expires_at_unix_ms=row.expires_at_unix_ms,
        used_by_node_id=None if row.used_by_node_id is None else NodeId(row.used_by_node_id),
        revoked=row.revoked,
    )
