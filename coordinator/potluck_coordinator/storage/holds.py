"""Holds, as rows.

Decides that of all who would close a hold one does. Triggers let a hold leave `open` once, keep what it was opened with, and let its mark
only grow. Almost every hold has one payee and is one row; several payees' shares are rows of their own, beside it. It must not know whose
credits are moved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Final

from sqlalchemy import Connection, bindparam, select
from sqlmodel import col

from potluck_coordinator.domain.ledger import Hold, HoldState, OpenHold
from potluck_coordinator.domain.ledger_batch import ClosedHold
from potluck_coordinator.domain.payees import PayeeShare, merged
from potluck_coordinator.storage.bulk import Change, Insertion, Row, Selection
from potluck_coordinator.storage.tables import IS_OPEN, GatewayRow, HoldRow
from potluck_protocol.errors import ErrorCode, PotluckError

# Rows stay as they are read until the transaction ends, in one order for all who read several.
_GET: Final = Selection(
    "hold.hold_id, payer_account_id, payee_account_id, amount, delivered, settled, state, gateway_epoch, expires_at_unix_ms,"
    " hold_payee.account_id, hold_payee.weight",
    "hold LEFT JOIN hold_payee ON hold_payee.hold_id = hold.hold_id",
    ("hold.hold_id", "text"),
    "hold",
)
_OPEN: Final = select(col(HoldRow.hold_id)).where(IS_OPEN).limit(bindparam("count_max"))
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
_STATES: Final = {state.value: state for state in HoldState}
"""Found sooner than an enumeration finds them, once for each hold that is read."""
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

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, hold_id: str) -> Hold | None:
        return self.several([hold_id]).get(hold_id)

    def several(self, hold_ids: Collection[str]) -> dict[str, Hold]:
        """Those that there are, by id: each of as many rows as it has shares, or of the one that has none."""
        rows = _GET.run(self._connection, hold_ids)
        holds = {row[0]: _hold(row, (PayeeShare(row[2], 1),)) for row in rows if row[-1] is None}
        for hold_id, each in groupby([row for row in rows if row[-1] is not None], itemgetter(0)):
            shares = list(each)
            holds[hold_id] = _hold(shares[0], merged([PayeeShare(account_id, weight) for *_, account_id, weight in shares]))
        return holds

    def add(self, commands: Sequence[OpenHold], now_unix_ms: int) -> None:
        """Opens new ones, each sealing its shares."""
        _ADD_PAYEES.run(
            self._connection,
            [
                (command.hold_id, share.account_id, share.weight)
                for command in commands
                if len(command.payees) > 1
                for share in command.payees
            ],
        )
        _ADD.run(
            self._connection,
            [
                (
                    command.hold_id,
                    command.payer,
                    command.payees[0].account_id,
                    command.amount_micro_credits,
                    0,
                    0,
                    HoldState.OPEN.value,
                    command.gateway_epoch,
                    command.expires_at_unix_ms,
                    now_unix_ms,
                )
                for command in commands
            ],
        )

    def mark(self, marks: Mapping[str, int]) -> None:
        """Raises open holds' marks."""
        _MARK.run(self._connection, list(marks.items()))

    def close(self, ends: Sequence[ClosedHold], now_unix_ms: int) -> None:
        """Ends open holds; raises PotluckError(INTERNAL_ERROR) where one has ended already, of which nothing may then be written."""
        rows = [(end.hold_id, end.state.value, end.settled_micro_credits, now_unix_ms) for end in ends]
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


def _hold(row: Row, payees: tuple[PayeeShare, ...]) -> Hold:
    hold_id, payer, _, amount, delivered, settled, state, gateway_epoch, expires_at_unix_ms, _, _ = row
    return Hold(hold_id, payer, payees, amount, delivered, settled, _STATES[state], gateway_epoch, expires_at_unix_ms)
