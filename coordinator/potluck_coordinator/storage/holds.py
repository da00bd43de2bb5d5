"""Holds, as rows.

Decides that of all who would close a hold one does. Triggers let a hold leave `open` once, keep what it was opened with, and let its mark
only grow. Almost every hold has one payee and is one row; several payees' shares are rows of their own, beside it. It must not know whose
credits are moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import bindparam, select
from sqlmodel import Session, col, insert, update

from potluck_coordinator.domain.ledger import Hold, HoldState, OpenHold
from potluck_coordinator.domain.payees import PayeeShare, merged
from potluck_coordinator.storage.tables import GatewayRow, HoldPayeeRow, HoldRow
from potluck_protocol.values import AccountId

# Built once and run past the session: putting them together anew was most of what a payment cost.
_GET: Final = (
    select(HoldRow, col(HoldPayeeRow.account_id), col(HoldPayeeRow.weight))
    .join(HoldPayeeRow, col(HoldPayeeRow.hold_id) == col(HoldRow.hold_id), isouter=True)
    .where(col(HoldRow.hold_id) == bindparam("hold"))
)
_OPEN: Final = select(col(HoldRow.hold_id)).where(col(HoldRow.state) == HoldState.OPEN).limit(bindparam("count_max"))
_OVERDUE: Final = _OPEN.where(col(HoldRow.expires_at_unix_ms) <= bindparam("now")).order_by(col(HoldRow.expires_at_unix_ms))
_ORPHANED: Final = _OPEN.where(col(HoldRow.gateway_epoch).not_in(select(col(GatewayRow.epoch))))
_ADD: Final = insert(HoldRow)
_ADD_PAYEE: Final = insert(HoldPayeeRow)
_MARK: Final = update(HoldRow).where(col(HoldRow.hold_id) == bindparam("hold")).values(delivered=bindparam("mark"))
_CLOSE: Final = (
    update(HoldRow)
    .where(col(HoldRow.hold_id) == bindparam("hold"), col(HoldRow.state) == HoldState.OPEN)
    .values(state=bindparam("end"), settled=bindparam("paid"), closed_at_unix_ms=bindparam("now"))
)


class HoldRepository:
    """The `hold` and `hold_payee` tables."""

    def __init__(self, session: Session) -> None:
        self._connection = session.connection()

    def get(self, hold_id: str) -> Hold | None:
        rows = self._connection.execute(_GET, {"hold": hold_id}).all()
        return _hold(rows) if rows else None

    def add(self, command: OpenHold, now_unix_ms: int) -> None:
        if len(command.payees) > 1:
            shares = [{"hold_id": command.hold_id, "account_id": share.account_id, "weight": share.weight} for share in command.payees]
            self._connection.execute(_ADD_PAYEE, shares)
        opened = {
            "hold_id": command.hold_id,
            "payer_account_id": command.payer,
            "payee_account_id": command.payees[0].account_id,
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
        return self._each(self._connection.execute(_OVERDUE, {"now": now_unix_ms, "count_max": limit}).scalars().all())

    def orphaned(self, limit: int) -> tuple[Hold, ...]:
        """Open holds of gateway epochs that are nobody's any more."""
        return self._each(self._connection.execute(_ORPHANED, {"count_max": limit}).scalars().all())

    def _each(self, hold_ids: Sequence[str]) -> tuple[Hold, ...]:
        return tuple(hold for hold_id in hold_ids if (hold := self.get(hold_id)) is not None)


def _hold(rows: Sequence[Any]) -> Hold:
    """One hold of as many rows as it has shares, or of the one that has none."""
    row = rows[0]
    if row.weight is None:
        payees: tuple[PayeeShare, ...] = (PayeeShare(AccountId(row.payee_account_id), 1),)
    else:
        payees = merged([PayeeShare(AccountId(share.account_id), share.weight) for share in rows])
    return Hold(
        hold_id=row.hold_id,
        payer=AccountId(row.payer_account_id),
        payees=payees,
        amount_micro_credits=row.amount,
        delivered_micro_credits=row.delivered,
        settled_micro_credits=row.settled,
        state=HoldState(row.state),
        gateway_epoch=row.gateway_epoch,
        expires_at_unix_ms=row.expires_at_unix_ms,
    )
