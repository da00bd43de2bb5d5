"""People, as rows.

Decides in which order they are listed. It must not know their keys or credits.
"""

from __future__ import annotations

from sqlmodel import Session, col, select

from potluck_coordinator.desks import AccountRecord
from potluck_coordinator.storage.tables import AccountRow
from potluck_protocol.values import AccountId


class AccountRepository:
    """The `account` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, account: AccountRecord) -> None:
        self._session.add(
            AccountRow(
                account_id=account.account_id,
                name=account.name,
                operator=account.operator,
                created_at_unix_ms=account.created_at_unix_ms,
            )
        )
        self._session.flush()

    def get(self, account_id: AccountId) -> AccountRecord | None:
        row = self._session.get(AccountRow, account_id)
        return None if row is None else _record(row)

    def named(self, name: str) -> AccountRecord | None:
        row = self._session.exec(select(AccountRow).where(AccountRow.name == name)).first()
        return None if row is None else _record(row)

    def list_all(self) -> tuple[AccountRecord, ...]:
        """Everyone, in the order of their coming."""
        rows = self._session.exec(select(AccountRow).order_by(col(AccountRow.created_at_unix_ms), col(AccountRow.account_id)))
        return tuple(_record(row) for row in rows)


def _record(row: AccountRow) -> AccountRecord:
    return AccountRecord(AccountId(row.account_id), row.name, row.operator, row.created_at_unix_ms)
