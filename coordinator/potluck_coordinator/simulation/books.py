"""The simulated pool's money: the live ledger's rules over a dict instead of a database.

Decides nothing that `domain.ledger` and `domain.pricing` do not decide. It must not know why an attempt ended.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Final

from potluck_coordinator.domain.ledger import (
    Hold,
    HoldState,
    LedgerAccountId,
    OpenHold,
    SettleHold,
    Transaction,
    grant,
    judge,
    settlement,
)
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.domain.pricing import fee
from potluck_coordinator.simulation.invariants import Invariants
from potluck_protocol.values import AccountId

PROMPT_PRICE_MICRO_CREDITS: Final = 100
COMPLETION_PRICE_MICRO_CREDITS: Final = 400
FEE_BASIS_POINTS: Final = 500
GRANT_MICRO_CREDITS: Final = 10**12
"""So much that nobody runs out: credits are no part of what is simulated, that they balance is."""


def price(prompt_tokens: int, completion_tokens: int) -> int:
    """Of an answer."""
    return prompt_tokens * PROMPT_PRICE_MICRO_CREDITS + completion_tokens * COMPLETION_PRICE_MICRO_CREDITS


class Books:
    """All accounts and open holds."""

    def __init__(self, invariants: Invariants) -> None:
        self._invariants = invariants
        self._balances: defaultdict[LedgerAccountId, int] = defaultdict(int)
        self._sum = 0
        self._holds: dict[str, Hold] = {}
        self._granted: set[AccountId] = set()
        self.gateway_epoch = 1
        self.transaction_count = 0

    def open(self, attempt_id: int, payer: AccountId, payee: AccountId, amount_micro_credits: int, now: float) -> None:
        """Sets aside what an attempt may cost."""
        if payer not in self._granted:
            self._granted.add(payer)
            self._book(grant(payer, GRANT_MICRO_CREDITS), now)
        command = OpenHold(str(attempt_id), payer, (PayeeShare(payee, 1),), amount_micro_credits, 0, self.gateway_epoch)
        if judge(self._holds.get(command.hold_id), command, {self.gateway_epoch}) is None:
            self._holds[command.hold_id] = Hold(
                hold_id=command.hold_id,
                payer=payer,
                payees=command.payees,
                amount_micro_credits=amount_micro_credits,
                delivered_micro_credits=0,
                settled_micro_credits=0,
                state=HoldState.OPEN,
                gateway_epoch=self.gateway_epoch,
                expires_at_unix_ms=0,
            )

    def settle(self, attempt_id: int, amount_micro_credits: int, now: float) -> int:
        """Pays for what an attempt delivered, once; what it was charged by this call."""
        command = SettleHold(str(attempt_id), amount_micro_credits)
        hold = self._holds.get(command.hold_id)
        if judge(hold, command, {self.gateway_epoch}) is not None or hold is None:
            return 0
        self._book(settlement(hold, amount_micro_credits, fee(amount_micro_credits, FEE_BASIS_POINTS)), now)
        self._holds[command.hold_id] = replace(hold, state=HoldState.SETTLED, settled_micro_credits=amount_micro_credits)
        return amount_micro_credits

    def forget(self, attempt_id: int) -> None:
        """An ended hold that nothing can come for any more."""
        hold = self._holds.get(str(attempt_id))
        if hold is not None and hold.state is not HoldState.OPEN:
            del self._holds[str(attempt_id)]

    @property
    def open_count(self) -> int:
        """Holds that nobody has settled."""
        return sum(hold.state is HoldState.OPEN for hold in self._holds.values())

    def _book(self, transaction: Transaction | None, now: float) -> None:
        if transaction is None:
            return
        self.transaction_count += 1
        for posting in transaction.postings:
            self._balances[posting.ledger_account_id] += posting.amount_micro_credits
            self._sum += posting.amount_micro_credits
        self._invariants.books_sum(self._sum, transaction.transaction_id, now)
