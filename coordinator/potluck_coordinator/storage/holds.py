"""Holds, as rows. A trigger lets a hold leave `open` once and keeps everything else of it as it was opened."""

from __future__ import annotations

from sqlmodel import Session, col, insert, select, update

from potluck_coordinator.domain.ledger import Hold, HoldState, OpenHold
from potluck_coordinator.storage.tables import HoldRow
from potluck_protocol.values import AccountId


class HoldRepository:
    """The `hold` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, hold_id: str) -> Hold | None:
        row = self._session.get(HoldRow, hold_id)
        return None if row is None else _hold(row)

    def add(self, command: OpenHold, now_unix_ms: int) -> None:
        self._session.exec(
            insert(HoldRow).values(
                hold_id=command.hold_id,
                payer_account_id=command.payer,
                payee_account_id=command.payee,
                amount=command.amount_micro_credits,
                delivered=0,
                settled=0,
                state=HoldState.OPEN,
                gateway_epoch=command.gateway_epoch,
                expires_at_unix_ms=command.expires_at_unix_ms,
                opened_at_unix_ms=now_unix_ms,
            )
        )

    def mark(self, hold_id: str, delivered_micro_credits: int) -> None:
        self._session.exec(update(HoldRow).where(col(HoldRow.hold_id) == hold_id).values(delivered=delivered_micro_credits))

    def close(self, hold_id: str, state: HoldState, settled_micro_credits: int, now_unix_ms: int) -> bool:
        """Ends the hold; of any number of callers one is told True."""
        statement = (
            update(HoldRow)
            .where(col(HoldRow.hold_id) == hold_id, col(HoldRow.state) == HoldState.OPEN)
            .values(state=state, settled=settled_micro_credits, closed_at_unix_ms=now_unix_ms)
        )
        return self._session.exec(statement).rowcount == 1

    def overdue(self, now_unix_ms: int, limit: int) -> tuple[Hold, ...]:
        """Open holds whose deadline has come, the oldest deadlines first."""
        rows = self._session.exec(
            select(HoldRow)
            .where(HoldRow.state == HoldState.OPEN, HoldRow.expires_at_unix_ms <= now_unix_ms)
            .order_by(col(HoldRow.expires_at_unix_ms))
            .limit(limit)
        )
        return tuple(_hold(row) for row in rows)

    def orphaned(self, before_epoch: int, limit: int) -> tuple[Hold, ...]:
        """Open holds of gateway epochs before that one."""
        rows = self._session.exec(select(HoldRow).where(HoldRow.state == HoldState.OPEN, HoldRow.gateway_epoch < before_epoch).limit(limit))
        return tuple(_hold(row) for row in rows)


def _hold(row: HoldRow) -> Hold:
    return Hold(
        hold_id=row.hold_id,
        payer=AccountId(row.payer_account_id),
        payee=AccountId(row.payee_account_id),
        amount_micro_credits=row.amount,
        delivered_micro_credits=row.delivered,
        settled_micro_credits=row.settled,
        state=HoldState(row.state),
        gateway_epoch=row.gateway_epoch,
        expires_at_unix_ms=row.expires_at_unix_ms,
    )
