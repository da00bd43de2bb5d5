"""The ledger's desk on a real database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.ledger import LedgerOutcome, MarkDelivered, SettleHold
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.books import GRANT, open_books, open_hold

APPLIED, CONFLICT, INSUFFICIENT = LedgerOutcome.APPLIED, LedgerOutcome.CONFLICT, LedgerOutcome.INSUFFICIENT_CREDITS


@pytest.fixture
def books(database_url):
    with open_books(database_url) as opened:
        opened.add_people("ann", "bob", "cat")
        yield opened
        assert opened.audit_now().findings == ()


async def position(books, account_id):
    balance = await books.ledger.balance(account_id)
    return balance.available_micro_credits, balance.held_micro_credits, balance.earned_micro_credits


async def test_hold_mark_settle(books):
    assert await books.ledger.apply([open_hold("h1")]) == (APPLIED,)
    assert await position(books, "ann") == (GRANT - 100, 100, 0)
    assert await books.ledger.apply([MarkDelivered("h1", 30), SettleHold("h1", 60)]) == (APPLIED, APPLIED)
    assert await position(books, "ann") == (GRANT - 60, 0, 0)
    assert await position(books, "bob") == (GRANT, 0, 57)
    report = await books.ledger.audit()
    assert (report.account_count, report.transaction_count, report.posting_count, report.open_hold_count) == (8, 4, 9, 0)
    assert report.issued_micro_credits == 3 * GRANT


async def test_one_refusal_does_not_touch_the_others(books):
    outcomes = await books.ledger.apply(
        [
            open_hold("h1", amount=GRANT),
            open_hold("h2", amount=1),
            open_hold("h3", payees={"nobody": 1}),
            open_hold("h4", payer="nobody"),
            SettleHold("h1", GRANT + 1),
            SettleHold("h9", 1),
            open_hold("h5", payer="bob", amount=0),
            SettleHold("h1", 1),
            open_hold("h2", amount=1),
        ]
    )
    assert outcomes == (APPLIED, INSUFFICIENT, CONFLICT, INSUFFICIENT, CONFLICT, CONFLICT, APPLIED, APPLIED, APPLIED)


async def test_repeated_commands_answer_the_same_and_change_nothing(books):
    commands = [open_hold("h1"), MarkDelivered("h1", 10), SettleHold("h1", 20)]
    assert await books.ledger.apply(commands) == (APPLIED,) * 3
    before = await position(books, "ann"), await position(books, "bob"), await books.ledger.audit()
    for _ in range(2):
        assert await books.ledger.apply(commands) == (APPLIED,) * 3
    assert await books.ledger.apply([replace(commands[0], amount_micro_credits=101), SettleHold("h1", 21)]) == (CONFLICT,) * 2
    assert (await position(books, "ann"), await position(books, "bob"), await books.ledger.audit()) == before


async def test_several_payees_earn_by_their_shares(books):
    shared = open_hold("h1", payees={"cat": 1, "bob": 2})
    assert await books.ledger.apply([shared, shared, SettleHold("h1", 60), SettleHold("h1", 60), shared]) == (APPLIED,) * 5
    assert await position(books, "ann") == (GRANT - 60, 0, 0)
    assert (await position(books, "bob"), await position(books, "cat")) == ((GRANT, 0, 38), (GRANT, 0, 19))
    paid = [line for name in ("ann", "bob", "cat") for line in await books.ledger.statement(name, 0) if line.transaction_id == "settle:h1"]
    assert [line.amount_micro_credits for line in paid] == [-60, 38, 19]  # and 3 to the pool
    assert (await books.ledger.audit()).posting_count == 3 * 2 + 4


async def test_a_payee_whose_part_rounds_to_nothing_gets_no_line(books):
    await books.ledger.apply([open_hold("h1", payees={"cat": 1, "bob": 2}), SettleHold("h1", 1)])
    assert ((await position(books, "bob"))[2], (await position(books, "cat"))[2]) == (1, 0)
    assert (await books.ledger.audit()).posting_count == 3 * 2 + 2


async def test_the_same_hold_with_other_shares_is_a_conflict(books):
    alone, shared = open_hold("h1"), open_hold("h2", payees={"bob": 2, "cat": 1})
    assert await books.ledger.apply([alone, shared]) == (APPLIED,) * 2
    others = [
        open_hold("h1", payees={"bob": 2, "cat": 1}),
        open_hold("h2"),
        open_hold("h2", payees={"bob": 1, "cat": 2}),
        open_hold("h2", payees={"bob": 2, "ann": 1}),
        open_hold("h2", payees={"bob": 2, "cat": 1, "ann": 1}),
    ]
    assert await books.ledger.apply(others) == (CONFLICT,) * 5
    assert await books.ledger.apply([open_hold("h3", payees={"bob": 1, "nobody": 1})]) == (CONFLICT,)
    assert await books.ledger.apply([alone, open_hold("h2", payees={"cat": 2, "bob": 4})]) == (APPLIED,) * 2
    await books.ledger.apply([SettleHold("h1", 0), SettleHold("h2", 0)])


async def test_whoever_does_not_come_back_pays_by_shares_too(books):
    await books.ledger.apply([open_hold("late", payees={"bob": 1, "cat": 1}, expires_in_ms=1000), MarkDelivered("late", 40)])
    await books.ledger.apply([open_hold("orphan", payees={"bob": 1, "cat": 3}), MarkDelivered("orphan", 40)])
    assert await books.ledger.settle_expired(books.clock.unix_ms() + 1000) == 1
    assert ((await position(books, "bob"))[2], (await position(books, "cat"))[2]) == (19, 19)
    books.gateways_are(2)
    assert await books.ledger.settle_orphans() == 1
    assert ((await position(books, "bob"))[2], (await position(books, "cat"))[2]) == (19 + 10, 19 + 28)  # 38 is 9.5 and 28.5


async def test_a_hold_past_its_deadline_is_settled_at_its_mark(books):
    await books.ledger.apply([open_hold("h1", expires_in_ms=1000), MarkDelivered("h1", 40), open_hold("h2", expires_in_ms=5000)])
    assert await books.ledger.settle_expired(books.clock.unix_ms() + 999) == 0
    assert await books.ledger.settle_expired(books.clock.unix_ms() + 1000) == 1
    assert await position(books, "ann") == (GRANT - 40 - 100, 100, 0)
    assert await position(books, "bob") == (GRANT, 0, 38)
    assert await books.ledger.apply([SettleHold("h1", 60), SettleHold("h1", 40), MarkDelivered("h1", 41)]) == (CONFLICT, APPLIED, CONFLICT)


async def test_holds_of_earlier_gateways_are_settled_at_their_marks(books):
    books.gateways_are(1, 2)
    await books.ledger.apply([open_hold(f"old{n}", amount=1, epoch=1) for n in range(300)] + [open_hold("new", epoch=2)])
    await books.ledger.apply([MarkDelivered("old0", 1)])
    assert await books.ledger.settle_orphans() == 0, "both gateways live"
    books.gateways_are(3, 2)
    assert await books.ledger.settle_orphans() == 300
    assert await position(books, "ann") == (GRANT - 1 - 100, 100, 0)
    assert await books.ledger.settle_orphans() == 0


async def test_a_replaced_gateways_last_commands_open_nothing(books):
    await books.ledger.apply([open_hold("before", amount=1, epoch=1)])
    books.gateways_are(2)
    assert await books.ledger.settle_orphans() == 1
    late = [open_hold("late", epoch=1), MarkDelivered("late", 1), SettleHold("late", 1), open_hold("before", amount=1, epoch=1)]
    assert await books.ledger.apply([*late, open_hold("new", epoch=2)]) == (CONFLICT, CONFLICT, CONFLICT, APPLIED, APPLIED)
    assert await position(books, "ann") == (GRANT - 100, 100, 0)
    await books.ledger.apply([SettleHold("new", 0)])
    assert (await books.ledger.audit()).open_hold_count == 0


async def test_the_audit_asks_why_a_hold_outlives_its_deadline(books):
    await books.ledger.apply([open_hold("h1", expires_in_ms=0)])
    books.clock.advance(61)
    report = await books.ledger.audit()
    assert report.findings == ("hold h1 is open 61000 ms past its deadline",)
    await books.ledger.settle_expired(books.clock.unix_ms())


async def test_claims_move_everything_earned_once(books):
    assert await books.ledger.claim_earnings("bob", "nothing yet") == 0
    await books.ledger.apply([open_hold("h1"), SettleHold("h1", 100)])
    assert await books.ledger.claim_earnings("bob", "nothing yet") == 0
    assert await books.ledger.claim_earnings("bob", "c1") == 95
    assert await books.ledger.claim_earnings("bob", "c1") == 95
    assert await books.ledger.claim_earnings("bob", "c2") == 0
    assert await books.ledger.claim_earnings("ann", "c1") == 0
    assert await position(books, "bob") == (GRANT + 95, 0, 0)


@pytest.mark.parametrize("claim_id", ["", "x" * 65, "a\nb"])
async def test_a_claim_needs_an_id(books, claim_id):
    with pytest.raises(PotluckError) as refused:
        await books.ledger.claim_earnings("bob", claim_id)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


async def test_statement(books):
    await books.ledger.apply([open_hold("h1")])
    books.clock.advance(1)
    await books.ledger.apply([SettleHold("h1", 100)])
    books.clock.advance(1)
    await books.ledger.claim_earnings("bob", "c1")
    lines = [(line.kind, line.ledger_account_kind, line.amount_micro_credits) for line in await books.ledger.statement("bob", 0)]
    assert sorted(lines[:2]) == [("claim", "earnings", -95), ("claim", "spending", 95)]
    assert lines[2:] == [("settle", "earnings", 95), ("grant", "spending", GRANT)]
    assert len(await books.ledger.statement("bob", 2)) == 2
    assert [line.amount_micro_credits for line in await books.ledger.statement("ann", 1)] == [-100]


async def test_unknown_accounts_are_not_found(books):
    for asked in (books.ledger.balance("zoe"), books.ledger.statement("zoe", 1), books.ledger.claim_earnings("zoe", "c")):
        with pytest.raises(PotluckError) as refused:
            await asked
        assert refused.value.code is ErrorCode.NOT_FOUND
