"""Holds with several payees in the database: what it refuses, what the audit finds, and books that were kept before there were any."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import IntegrityError

from potluck_coordinator.domain.ledger import FEE, ISSUER, LedgerOutcome, Posting, SettleHold, Transaction, TransactionKind
from tests.support.books import Books, keep_books_of_version, open_books, open_hold

SHARED = {"bob": 2, "cat": 1}


@pytest.fixture
def books(database_url):
    with open_books(database_url) as opened:
        opened.add_people("ann", "bob", "cat")
        yield opened


def test_only_shared_holds_have_rows_of_shares(books):
    books.apply_now(open_hold("alone"), open_hold("twice", payees={"bob": 7}), open_hold("shared", payees=SHARED))
    assert books.rows("SELECT * FROM hold_payee ORDER BY account_id") == [("shared", "bob", 2), ("shared", "cat", 1)]
    assert books.rows("SELECT hold_id, payee_account_id FROM hold ORDER BY hold_id") == [
        ("alone", "bob"),
        ("shared", "bob"),
        ("twice", "bob"),
    ]


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE hold_payee SET weight = weight + 1", "never changed"),
        ("DELETE FROM hold_payee", "never deleted"),
        ("INSERT INTO hold_payee VALUES ('h1', 'bob', 5) ON CONFLICT (hold_id, account_id) DO UPDATE SET weight = 5", "no more payees"),
        ("INSERT INTO hold_payee VALUES ('h1', 'ann', 5)", "no more payees"),
        ("INSERT INTO hold_payee VALUES ('h2', 'ann', 5)", "no more payees"),
        ("INSERT INTO hold_payee VALUES ('no hold', 'ann', 5)", "FOREIGN KEY|foreign key"),
        ("INSERT INTO hold_payee VALUES ('h3', 'ann', 0)", "hold_payee_weight"),
    ],
)
def test_the_database_keeps_shares_as_they_were_opened(books, statement, reason, settled):
    books.apply_now(open_hold("h1", payees=SHARED), open_hold("h2"))
    if settled:
        books.apply_now(SettleHold("h1", 60), SettleHold("h2", 60))
    with pytest.raises(IntegrityError, match=reason):
        books.execute(statement)
    assert books.audit_now().findings == ()


@pytest.mark.parametrize(
    ("tampering", "finding"),
    [
        (
            ("hold_payee_no_update", "UPDATE hold_payee SET weight = 2"),
            "hold h1 paid bob, cat 38+19, their shares are 29+28",
        ),
        (
            ("hold_payee_no_delete", "DELETE FROM hold_payee WHERE account_id = 'cat'"),
            "hold h1 paid bob 38, their shares are 57",
        ),
        (
            ("hold_payee_no_delete", "DELETE FROM hold_payee"),
            "hold h1 paid bob 38, their shares are 57",
        ),
        (
            ("hold_once", "UPDATE hold SET payee_account_id = 'cat' WHERE hold_id = 'h2'"),
            "hold h2 paid cat 0, their shares are 57",
        ),
        (
            (
                "posting_no_update",
                "UPDATE posting SET amount = amount - 1 WHERE transaction_id = 'settle:h1' AND ledger_account_id = 'node_owner:bob'",
                "UPDATE posting SET amount = amount + 1 WHERE transaction_id = 'settle:h1' AND ledger_account_id = 'node_owner:cat'",
            ),
            "hold h1 paid bob, cat 37+20, their shares are 38+19",
        ),
    ],
)
def test_the_audit_finds_shares_that_are_not_what_was_paid(books, tampering, finding):
    books.apply_now(open_hold("h1", payees=SHARED), open_hold("h2"), SettleHold("h1", 60), SettleHold("h2", 60))
    books.execute_despite(*tampering)
    assert finding in books.audit_now().findings


def test_books_that_were_kept_without_shares_go_on(empty_database_url):
    keep_books_of_version(empty_database_url, "0001", *_FIRST_BOOKS)
    books = Books(empty_database_url)
    try:
        (opened, known, shared, *settled) = books.apply_now(
            open_hold("old"),
            open_hold("paid"),
            open_hold("new", payees=SHARED),
            SettleHold("old", 60),
            SettleHold("paid", 40),
            SettleHold("new", 60),
        )
        assert {opened, known, shared, *settled} == {LedgerOutcome.APPLIED}
        assert [books.run_now(lambda work, name=name: work.ledger.position(f"node_owner:{name}")) for name in SHARED] == [
            (38 + 57 + 38, 0),
            (19, 0),
        ]
        assert books.audit_now().findings == ()
    finally:
        books.store.close()


# An open hold of 100, and one that settled at 40, of which 2 were the pool's.
_FIRST_BOOKS = (
    "INSERT INTO account VALUES ('ann', 'ann', FALSE, 0), ('bob', 'bob', FALSE, 0), ('cat', 'cat', FALSE, 0)",
    "INSERT INTO ledger_account VALUES ('issuer', NULL, 'issuer', 0, 0), ('fee', NULL, 'fee', 0, 0)",
    *(
        f"INSERT INTO ledger_account VALUES ('{kind}:{name}', '{name}', '{kind}', 0, 0)"
        for kind in ("user", "node_owner")
        for name in ("ann", "bob", "cat")
    ),
    "INSERT INTO posting VALUES ('grant:ann', 0, 'issuer', -1000, 0), ('grant:ann', 1, 'user:ann', 1000, 0)",
    "INSERT INTO posting VALUES ('settle:paid', 0, 'user:ann', -40, 0)",
    "INSERT INTO posting VALUES ('settle:paid', 1, 'node_owner:bob', 38, 0), ('settle:paid', 2, 'fee', 2, 0)",
    "UPDATE ledger_account SET held = 100 WHERE ledger_account_id = 'user:ann'",
    "INSERT INTO hold VALUES ('old', 'ann', 'bob', 100, 0, 0, 'open', 1, 1750000060000, 0, NULL)",
    "INSERT INTO hold VALUES ('paid', 'ann', 'bob', 100, 0, 40, 'settled', 1, 1750000060000, 0, 1)",
    *(
        f"INSERT INTO ledger_transaction VALUES ('{booked.transaction_id}', '{booked.kind}', '{booked.fingerprint}', 0)"
        for booked in (
            Transaction("grant:ann", TransactionKind.GRANT, (Posting(ISSUER, -1000), Posting("user:ann", 1000))),
            Transaction("settle:paid", TransactionKind.SETTLE, (Posting("user:ann", -40), Posting("node_owner:bob", 38), Posting(FEE, 2))),
        )
    ),
)
