"""Holds, as rows.

Decides that of all who would close a hold one does. A trigger lets a hold leave `open` once, keeps what it was opened with, and lets its
mark only grow. It must not know whose credits are moved.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Row, bindparam, select
from sqlmodel import Session, col, insert, update

from potluck_coordinator.domain.ledger import Hold, HoldState, OpenHold
from potluck_coordinator.storage.tables import HoldRow
from potluck_protocol.values import AccountId

# Built once and run past the session: putting them together anew was most of what a payment cost.
_GET: Final = select(HoldRow).where(col(HoldRow.hold_id) == bindparam("hold"))
_OPEN: Final = select(HoldRow).where(col(HoldRow.state) == HoldState.OPEN).limit(bindparam("count_max"))
_OVERDUE: Final = _OPEN.where(col(HoldRow.expires_at_unix_ms) <= bindparam("now")).order_by(col(HoldRow.expires_at_unix_ms))
_ORPHANED: Final = _OPEN.where(col(HoldRow.gateway_epoch) < bindparam("epoch"))
_ADD: Final = insert(HoldRow)
_MARK: Final = update(HoldRow).where(col(HoldRow.hold_id) == bindparam("hold")).values(delivered=bindparam("mark"))
_CLOSE: Final = (
    update(HoldRow)
    .where(col(HoldRow.hold_id) == bindparam("hold"), col(HoldRow.state) == HoldState.OPEN)
    .values(state=bindparam("end"), settled=bindparam("paid"), closed_at_unix_ms=bindparam("now"))
)


class HoldRepository:
    """The `hold` table."""

    def __init__(self, session: Session) -> None:
        self._connection = session.connection()

    def get(self, hold_id: str) -> Hold | None:
        row = self._connection.execute(_GET, {"hold": hold_id}).first()
        return None if row is None else _hold(row)

    def add(self, command: OpenHold, now_unix_ms: int) -> None:
        opened = {
            "hold_id": command.hold_id,
            "payer_account_id": command.payer,
            "payee_account_id": command.payee,
            "amount": command.amount_micro_credits,
            "delivered": 0,
            "settled": 0,
            "state": HoldState.OPEN,
            "gateway_epoch": command.gateway_epoch,
            "expires_at_unix_ms": command.expires_at_unix_ms,
            "opened_at_unix_ms": now_unix_ms,
        }
        self._connection.execute(_ADD, opened)

    def mark(self, hold_id: str, delivered_micro_credits: int) -> None:
        self._connection.execute(_MARK, {"hold": hold_id, "mark": delivered_micro_credits})

    def close(self, hold_id: str, state: HoldState, settled_micro_credits: int, now_unix_ms: int) -> bool:
        """Ends the hold; of any number of callers one is told True."""
        end = {"hold": hold_id, "end": state, "paid": settled_micro_credits, "now": now_unix_ms}
        return self._connection.execute(_CLOSE, end).rowcount == 1

    def overdue(self, now_unix_ms: int, limit: int) -> tuple[Hold, ...]:
        """Open holds whose deadline has come, the oldest deadlines first."""
        return tuple(_hold(row) for row in self._connection.execute(_OVERDUE, {"now": now_unix_ms, "count_max": limit}))

    def orphaned(self, before_epoch: int, limit: int) -> tuple[Hold, ...]:
        """Open holds of gateway epochs before that one."""
        return tuple(_hold(row) for row in self._connection.execute(_ORPHANED, {"epoch": before_epoch, "count_max": limit}))


def _hold(row: Row[Any]) -> Hold:
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
