"""Holds, as rows.

Decides that of all who would close a hold one does. Triggers let a hold leave `open` once, keep what it was opened with, and let its mark
only grow. Almost every hold has one payee and is one row; several payees' shares are rows of their own, beside it. It must not know whose
credits are moved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import bindparam, select
from sqlmodel import Session, col

from potluck_coordinator.domain.ledger import Hold, HoldState, OpenHold
from potluck_coordinator.domain.ledger_batch import ClosedHold
from potluck_coordinator.domain.payees import PayeeShare, merged
from potluck_coordinator.storage.bulk import Change, Insertion
from potluck_coordinator.storage.tables import GatewayRow, HoldPayeeRow, HoldRow
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId

# Built once and run past the session: putting them together anew was most of what a payment cost. Rows stay as they are read until the
# transaction ends, in one order for all who read several (SQLite has one writer anyway).
_GET: Final = (
    select(HoldRow, col(HoldPayeeRow.account_id), col(HoldPayeeRow.weight))
    .join(HoldPayeeRow, col(HoldPayeeRow.hold_id) == col(HoldRow.hold_id), isouter=True)
    .where(col(HoldRow.hold_id).in_(bindparam("holds", expanding=True)))
    .order_by(col(HoldRow.hold_id))
    .with_for_update(of=HoldRow)
)
_OPEN: Final = select(col(HoldRow.hold_id)).where(col(HoldRow.state) == HoldState.OPEN).limit(bindparam("count_max"))
_OVERDUE: Final = _OPEN.where(col(HoldRow.expires_at_unix_ms) <= bindparam("now")).order_by(col(HoldRow.expires_at_unix_ms))
_ORPHANED: Final = _OPEN.where(col(HoldRow.gateway_epoch).not_in(select(col(GatewayRow.epoch))))
_ADD: Final = Insertion(
    "hold",
    {
        "hold_id": "text",
        "payer_account_id": "text",
        "payee_account_id": "text",
        "amount": "bigint",
        "delivered": "bigint",
        "settled": "bigint",
        "state": "text",
        "gateway_epoch": "bigint",
        "expires_at_unix_ms": "bigint",
        "opened_at_unix_ms": "bigint",
    },
)
_ADD_PAYEES: Final = Insertion("hold_payee", {"hold_id": "text", "account_id": "text", "weight": "bigint"})
_MARK: Final = Change("hold", ("hold_id", "text"), {"mark": "bigint"}, {"delivered": "given.mark"})
_CLOSE: Final = Change(
    "hold",
    ("hold_id", "text"),
    {"end_state": "text", "paid": "bigint", "closed_at": "bigint"},
    {"state": "given.end_state", "settled": "given.paid", "closed_at_unix_ms": "given.closed_at"},
    only_where="hold.state = 'open'",
)


class HoldRepository:
    """The `hold` and `hold_payee` tables."""

    def __init__(self, session: Session) -> None:
        self._connection = session.connection()

    def get(self, hold_id: str) -> Hold | None:
        return self.several([hold_id]).get(hold_id)

    def several(self, hold_ids: Collection[str]) -> dict[str, Hold]:
        """Those that there are, by id."""
        rows = self._connection.execute(_GET, {"holds": sorted(hold_ids)})
        return {hold_id: _hold(list(each)) for hold_id, each in groupby(rows, lambda row: row.hold_id)}

    def add(self, commands: Sequence[OpenHold], now_unix_ms: int) -> None:
        """Opens new ones, each sealing its shares."""
        _ADD_PAYEES.run(
            self._connection,
            [
                {"hold_id": command.hold_id, "account_id": share.account_id, "weight": share.weight}
                for command in commands
                if len(command.payees) > 1
                for share in command.payees
            ],
        )
        _ADD.run(
            self._connection,
            [
                {
                    "hold_id": command.hold_id,
                    "payer_account_id": command.payer,
                    "payee_account_id": command.payees[0].account_id,
                    "amount": command.amount_micro_credits,
                    "delivered": 0,
                    "settled": 0,
                    "state": HoldState.OPEN.value,
                    "gateway_epoch": command.gateway_epoch,
                    "expires_at_unix_ms": command.expires_at_unix_ms,
                    "opened_at_unix_ms": now_unix_ms,
                }
                for command in commands
            ],
        )

    def mark(self, marks: Mapping[str, int]) -> None:
        """Raises open holds' marks."""
        _MARK.run(self._connection, [{"hold_id": hold_id, "mark": mark} for hold_id, mark in marks.items()])

    def close(self, ends: Sequence[ClosedHold], now_unix_ms: int) -> None:
        """Ends open holds; raises PotluckError(INTERNAL_ERROR) where one has ended already, of which nothing may then be written."""
        rows = [
            {"hold_id": end.hold_id, "end_state": end.state.value, "paid": end.settled_micro_credits, "closed_at": now_unix_ms}
            for end in ends
        ]
        if _CLOSE.run(self._connection, rows) != len(ends):
            raise PotluckError(ErrorCode.INTERNAL_ERROR, "A hold was closed by another hand.")

    def overdue(self, now_unix_ms: int, limit: int) -> tuple[Hold, ...]:
        """Open holds whose deadline has come, of the oldest deadlines."""
        return self._each(self._connection.execute(_OVERDUE, {"now": now_unix_ms, "count_max": limit}).scalars().all())

    def orphaned(self, limit: int) -> tuple[Hold, ...]:
        """Open holds of epochs that are no gateway's any more."""
        return self._each(self._connection.execute(_ORPHANED, {"count_max": limit}).scalars().all())

    def _each(self, hold_ids: Sequence[str]) -> tuple[Hold, ...]:
        # Locked only now: one may have ended meanwhile, by another's hand.
        return tuple(hold for hold in self.several(hold_ids).values() if hold.state is HoldState.OPEN) if hold_ids else ()


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
