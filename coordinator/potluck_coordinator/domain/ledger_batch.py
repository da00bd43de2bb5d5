"""Many ledger commands, one after the other, worked out together: what each of them comes to, and all that they change.

Decides the same as if each were carried out alone, in order (`ledger.judge` and the rules of `ledger`), over holds and accounts as the
books have them. So the books are read once and written once, however many commands share a commit. It must not know tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import NamedTuple

from potluck_coordinator.domain import pricing
from potluck_coordinator.domain.ledger import (
    FEE,
    Hold,
    HoldState,
    LedgerAccountId,
    LedgerAccountKind,
    LedgerCommand,
    LedgerOutcome,
    MarkDelivered,
    OpenHold,
    Transaction,
    judge,
    ledger_account_id,
    settlement,
)


class ClosedHold(NamedTuple):
    """A hold's end."""

    hold_id: str
    state: HoldState
    settled_micro_credits: int


@dataclass(frozen=True, slots=True)
class LedgerChanges:
    """What a batch writes. Writing it in the order of the fields, no account is overdrawn in between."""

    opened: tuple[OpenHold, ...]
    marks: Mapping[str, int]
    """By hold: only those that end the batch open, or were raised before they closed."""
    closed: tuple[ClosedHold, ...]
    held_changes: Mapping[LedgerAccountId, int]
    """How much more, or less, of an account is held afterwards."""
    transactions: tuple[Transaction, ...]


def accounts_of(commands: Iterable[LedgerCommand], holds: Iterable[Hold]) -> frozenset[LedgerAccountId]:
    """Every account that the commands, and the ends of these holds, may look at or move."""
    opened = [command for command in commands if isinstance(command, OpenHold)]
    moving: list[OpenHold | Hold] = [*opened, *holds]
    payers = {one.payer for one in moving}
    payees = {share.account_id for one in moving for share in one.payees}
    return frozenset(
        [
            FEE,
            *(ledger_account_id(LedgerAccountKind.USER, payer) for payer in payers),
            *(ledger_account_id(LedgerAccountKind.NODE_OWNER, payee) for payee in payees),
        ]
    )


class LedgerBatch:
    """One batch, as it is worked out.

    Args:
        holds: as the books have them, by id: of all that the commands name.
        positions: of the accounts that `accounts_of` gives, what is posted and what of it is held.
        gateway_epochs: those that are some gateway's now.
        fee_basis_points: the pool's share of each payment.
    """

    def __init__(
        self,
        holds: Mapping[str, Hold],
        positions: Mapping[LedgerAccountId, tuple[int, int]],
        gateway_epochs: AbstractSet[int],
        fee_basis_points: int,
    ) -> None:
        self._holds = holds
        self._free = {account_id: posted - held for account_id, (posted, held) in positions.items()}
        self._gateway_epochs = gateway_epochs
        self._fee_basis_points = fee_basis_points
        self._opened: dict[str, OpenHold] = {}
        self._marks: dict[str, int] = {}
        self._closed: dict[str, ClosedHold] = {}
        self._held_changes: dict[LedgerAccountId, int] = {}
        self._transactions: list[Transaction] = []

    def carry_out(self, commands: Sequence[LedgerCommand]) -> tuple[LedgerOutcome, ...]:
        """What each comes to."""
        return tuple([self._carry_out(command) for command in commands])

    def _carry_out(self, command: LedgerCommand) -> LedgerOutcome:
        hold = self._hold(command.hold_id)
        outcome = judge(hold, command, self._gateway_epochs)
        if outcome is not None:
            return outcome
        if isinstance(command, OpenHold):
            return self._open(command)
        assert hold is not None, "judge refuses what names no hold"
        if isinstance(command, MarkDelivered):
            self._marks[hold.hold_id] = command.amount_micro_credits
        else:
            self.close(hold, HoldState.SETTLED, command.amount_micro_credits)
        return LedgerOutcome.APPLIED

    def _hold(self, hold_id: str) -> Hold | None:
        """As the commands so far have left it: made only now, for hardly any hold is named by two commands of a batch."""
        opened, mark, end = self._opened.get(hold_id), self._marks.get(hold_id), self._closed.get(hold_id)
        hold = self._holds.get(hold_id) if opened is None else _as_opened(opened)
        if hold is not None and mark is not None:
            hold = replace(hold, delivered_micro_credits=mark)
        if hold is not None and end is not None:
            hold = replace(hold, state=end.state, settled_micro_credits=end.settled_micro_credits)
        return hold

    def _open(self, command: OpenHold) -> LedgerOutcome:
        if any(ledger_account_id(LedgerAccountKind.NODE_OWNER, share.account_id) not in self._free for share in command.payees):
            return LedgerOutcome.CONFLICT
        payer, amount = ledger_account_id(LedgerAccountKind.USER, command.payer), command.amount_micro_credits
        if self._free.get(payer, -1) < amount:
            return LedgerOutcome.INSUFFICIENT_CREDITS
        self._hold_more(payer, amount)
        self._opened[command.hold_id] = command
        return LedgerOutcome.APPLIED

    def close(self, hold: Hold, state: HoldState, amount_micro_credits: int) -> None:
        """Ends an open hold: pays the amount out of it, and frees the rest."""
        payer = ledger_account_id(LedgerAccountKind.USER, hold.payer)
        self._hold_more(payer, -hold.amount_micro_credits)
        self._free[payer] -= amount_micro_credits
        self._closed[hold.hold_id] = ClosedHold(hold.hold_id, state, amount_micro_credits)
        payment = settlement(hold, amount_micro_credits, pricing.fee(amount_micro_credits, self._fee_basis_points))
        if payment is not None:
            self._transactions.append(payment)

    def _hold_more(self, account_id: LedgerAccountId, amount_micro_credits: int) -> None:
        self._free[account_id] -= amount_micro_credits
        self._held_changes[account_id] = self._held_changes.get(account_id, 0) + amount_micro_credits

    def changes(self) -> LedgerChanges:
        """All that has come of it."""
        held_changes = {account_id: change for account_id, change in self._held_changes.items() if change}
        opened, closed = tuple(self._opened.values()), tuple(self._closed.values())
        return LedgerChanges(opened, self._marks, closed, held_changes, tuple(self._transactions))


def _as_opened(command: OpenHold) -> Hold:
    return Hold(
        hold_id=command.hold_id,
        payer=command.payer,
        payees=command.payees,
        amount_micro_credits=command.amount_micro_credits,
        delivered_micro_credits=0,
        settled_micro_credits=0,
        state=HoldState.OPEN,
        gateway_epoch=command.gateway_epoch,
        expires_at_unix_ms=command.expires_at_unix_ms,
    )
