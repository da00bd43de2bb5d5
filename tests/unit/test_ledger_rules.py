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
from potluck_coordinator.domain.payees import PayeeShare
from potluck_protocol.values import AccountId
from tests.support.books import open_hold

ANN, BOB, CAT = AccountId("ann"), AccountId("bob"), AccountId("cat")
BOB_ALONE, BOB_AND_CAT = (PayeeShare(BOB, 1),), (PayeeShare(BOB, 2), PayeeShare(CAT, 1))
OPENED = open_hold("h1")
HOLD = Hold("h1", ANN, BOB_ALONE, 100, 40, 0, HoldState.OPEN, OPENED.gateway_epoch, OPENED.expires_at_unix_ms)
SHARED = replace(HOLD, payees=BOB_AND_CAT)
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
        (HOLD, replace(OPENED, payees=(PayeeShare(ANN, 1),)), CONFLICT),
        (HOLD, replace(OPENED, payees=(PayeeShare(BOB, 7),)), APPLIED),
        (HOLD, replace(OPENED, payees=BOB_AND_CAT), CONFLICT),
        (SHARED, OPENED, CONFLICT),
        (SHARED, replace(OPENED, payees=BOB_AND_CAT), APPLIED),
        (SHARED, replace(OPENED, payees=(PayeeShare(CAT, 2), PayeeShare(BOB, 3), PayeeShare(BOB, 1))), APPLIED),
        (SHARED, replace(OPENED, payees=(PayeeShare(BOB, 1), PayeeShare(CAT, 2))), CONFLICT),
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
    assert judge(hold, command, {OPENED.gateway_epoch}) is expected


@pytest.mark.parametrize(
    ("epochs", "hold", "expected"),
    [
        ({2}, None, CONFLICT),
        (set(), None, CONFLICT),
        ({1}, None, None),
        ({1, 2}, None, None),
        ({0, 2}, None, CONFLICT),
        ({2}, HOLD, APPLIED),
    ],
)
def test_a_gateway_whose_epoch_is_nobodys_opens_nothing(epochs, hold, expected):
    assert judge(hold, OPENED, epochs) is expected


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


@pytest.mark.parametrize(
    ("amount", "fee", "expected"),
    [
        (100, 5, {"user:ann": -100, "node_owner:bob": 63, "node_owner:cat": 32, "fee": 5}),
        (60, 0, {"user:ann": -60, "node_owner:bob": 40, "node_owner:cat": 20}),
        (1, 0, {"user:ann": -1, "node_owner:bob": 1}),
        (5, 5, {"user:ann": -5, "fee": 5}),
    ],
)
def test_a_shared_settlement_has_a_line_for_each_payee_who_gets_something(amount, fee, expected):
    postings = settlement(SHARED, amount, fee).postings
    assert {posting.ledger_account_id: posting.amount_micro_credits for posting in postings} == expected
    assert len(postings) == len(expected)


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
