"""The ledger's rules without a database: what a command comes to, and which postings an event makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.ledger import (
    AMOUNT_MICRO_CREDITS_MAX,
    FEE,
    ISSUER,
    Hold,
    HoldState,
    LedgerOutcome,
    MarkDelivered,
    Posting,
    SettleHold,
    Transaction,
    TransactionKind,
    claim,
    grant,
    judge,
    ledger_account_id,
    settlement,
)
from potluck_protocol.values import AccountId
from tests.support.books import open_hold

ANN, BOB = AccountId("ann"), AccountId("bob")
OPENED = open_hold("h1")
HOLD = Hold("h1", ANN, BOB, 100, 40, 0, HoldState.OPEN, OPENED.gateway_epoch, OPENED.expires_at_unix_ms)
SETTLED = replace(HOLD, state=HoldState.SETTLED, settled_micro_credits=60)
EXPIRED = replace(HOLD, state=HoldState.EXPIRED, settled_micro_credits=40)
APPLIED, CONFLICT = LedgerOutcome.APPLIED, LedgerOutcome.CONFLICT


@pytest.mark.parametrize(
    ("hold", "command", "expected"),
    [
        (None, OPENED, None),
        (HOLD, OPENED, APPLIED),
        (SETTLED, OPENED, APPLIED),
        (HOLD, replace(OPENED, amount_micro_credits=99), CONFLICT),
        (HOLD, replace(OPENED, payer=BOB), CONFLICT),
        (HOLD, replace(OPENED, payee=ANN), CONFLICT),
        (HOLD, replace(OPENED, gateway_epoch=2), CONFLICT),
        (HOLD, replace(OPENED, expires_at_unix_ms=1), CONFLICT),
        (None, MarkDelivered("h1", 1), CONFLICT),
        (HOLD, MarkDelivered("h1", 101), CONFLICT),
        (HOLD, MarkDelivered("h1", 41), None),
        (HOLD, MarkDelivered("h1", 40), APPLIED),
        (HOLD, MarkDelivered("h1", 7), APPLIED),
        (SETTLED, MarkDelivered("h1", 40), APPLIED),
        (SETTLED, MarkDelivered("h1", 41), CONFLICT),
        (None, SettleHold("h1", 1), CONFLICT),
        (HOLD, SettleHold("h1", 101), CONFLICT),
        (HOLD, SettleHold("h1", 0), None),
        (HOLD, SettleHold("h1", 100), None),
        (SETTLED, SettleHold("h1", 60), APPLIED),
        (SETTLED, SettleHold("h1", 61), CONFLICT),
        (EXPIRED, SettleHold("h1", 40), APPLIED),
        (EXPIRED, SettleHold("h1", 60), CONFLICT),
    ],
)
def test_judge(hold, command, expected):
    assert judge(hold, command, OPENED.gateway_epoch) is expected


@pytest.mark.parametrize(("newest_epoch", "hold", "expected"), [(2, None, CONFLICT), (1, None, None), (0, None, None), (2, HOLD, APPLIED)])
def test_a_replaced_gateway_opens_nothing(newest_epoch, hold, expected):
    assert judge(hold, OPENED, newest_epoch) is expected


@pytest.mark.parametrize("amount", [-1, AMOUNT_MICRO_CREDITS_MAX + 1])
def test_no_command_carries_an_amount_out_of_bounds(amount):
    for make in (lambda: open_hold("h", amount=amount), lambda: MarkDelivered("h", amount), lambda: SettleHold("h", amount)):
        with pytest.raises(ValueError, match="micro-credits"):
            make()


@pytest.mark.parametrize("amounts", [(5,), (5, -4), (5, 0, -5), ()])
def test_a_transaction_that_does_not_balance_cannot_be_made(amounts):
    with pytest.raises(ValueError, match="sum to zero"):
        Transaction("t", TransactionKind.GRANT, tuple(Posting(ISSUER, amount) for amount in amounts))


@given(amount=st.integers(0, 100), fee_share=st.floats(0, 1))
def test_a_settlement_moves_the_amount_and_nothing_else(amount, fee_share):
    fee = int(amount * fee_share)
    transaction = settlement(HOLD, amount, fee)
    if amount == 0:
        assert transaction is None
        return
    moved = {posting.ledger_account_id: posting.amount_micro_credits for posting in transaction.postings}
    assert moved.get(ledger_account_id("user", ANN)) == -amount
    assert moved.get(ledger_account_id("node_owner", BOB), 0) == amount - fee
    assert moved.get(FEE, 0) == fee
    assert sum(moved.values()) == 0


def test_a_settlement_above_the_hold_cannot_be_made():
    with pytest.raises(ValueError, match="cannot settle"):
        settlement(HOLD, 101, 0)
    with pytest.raises(ValueError, match="cannot settle"):
        settlement(HOLD, 10, 11)


def test_fingerprint_tells_every_difference():
    base = grant(ANN, 5)
    others = [grant(ANN, 6), grant(BOB, 5), claim(ANN, "c", 5), replace(base, postings=base.postings[::-1])]
    assert len({transaction.fingerprint for transaction in [base, *others]}) == 5
    assert grant(ANN, 5).fingerprint == base.fingerprint
    assert grant(ANN, 0) is None
    assert claim(ANN, "c", 0) is None
