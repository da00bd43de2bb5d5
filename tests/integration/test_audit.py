"""The audit goes through the books in steps, and payments go on between them."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from potluck_coordinator.domain.ledger import LedgerOutcome, SettleHold
from potluck_coordinator.storage import audit as audit_module
from potluck_coordinator.storage.audit import _EARNINGS, _LINES, _OF_HOLDS, _OF_TRANSACTIONS, FINDINGS_PER_RULE_MAX, AuditRun, Page, within
from tests.support.books import open_books, open_hold


@pytest.fixture
def books(database_url):
    with open_books(database_url, grant=100_000) as opened:
        opened.add_people("ann", "bob", grant=100_000)
        yield opened


def pay(books, *hold_ids: str) -> None:
    commands = [command for hold_id in hold_ids for command in (open_hold(hold_id), SettleHold(hold_id, 60))]
    assert set(books.apply_now(*commands)) == {LedgerOutcome.APPLIED}


def test_what_is_wrong_is_found_on_every_page(books, monkeypatch):
    pay(books, *(f"h{number:02}" for number in range(20)))
    books.execute_despite("posting_no_update", "UPDATE posting SET amount = amount + 1 WHERE transaction_id = 'settle:h03' AND line = 0")
    books.execute_despite("hold_no_delete", "DELETE FROM hold WHERE hold_id = 'h11'")
    books.execute_despite("posting_no_delete", "DELETE FROM posting WHERE transaction_id IN ('settle:h07', 'settle:h19')")
    at_once = books.audit_now()
    assert at_once.findings == (
        "transaction settle:h03 has 3 postings that sum to 1, not to zero",
        "transaction settle:h07 has no postings",
        "transaction settle:h19 has no postings",
        "transaction settle:h11 pays for no hold that settled",
        "transaction settle:h03 is not what was booked",
        "hold h03 settled 60, its payer's account was charged 59",
        "hold h07 settled 60, its payer's account was charged 0",
        "hold h19 settled 60, its payer's account was charged 0",
        "hold h07 paid bob 0, their shares are 60",
        "hold h19 paid bob 0, their shares are 60",
        "account fee says 60 posted, its postings sum to 54",
        "account node_owner:bob says 1140 posted, its postings sum to 1026",
        "account user:ann says 98800 posted, its postings sum to 98921",
    )
    for page_length in (1, 2, 7):
        monkeypatch.setattr(audit_module, "PAGE_LENGTH", page_length)
        assert books.audit_now() == at_once


@pytest.mark.parametrize("query", [query for _, query in (*_OF_TRANSACTIONS, *_OF_HOLDS)] + [_LINES, _EARNINGS])
def test_a_step_reads_its_own_keys_alone_and_finds_their_partners_by_theirs(tmp_path, query):
    """On SQLite: PostgreSQL's planner goes by what is in the tables, and joins by hash where that is less work."""
    with open_books(f"sqlite:///{tmp_path / 'potluck.db'}") as books:
        asked = text(f"EXPLAIN QUERY PLAN {within(query, Page('a', 'b'))}"), {"after": "a", "until": "b"}
        plan = [step[3] for step in books.run_now(lambda work: work.audit._connection.execute(*asked).all())]
    assert not any(step.startswith("SCAN") for step in plan), plan
    first, *partners = [step for step in plan if step.startswith("SEARCH")]
    assert "_id>? AND " in first, plan
    assert all("_id=?" in step and "ix_posting" not in step for step in partners), plan


def test_many_breaches_of_a_kind_are_told_in_part(books, monkeypatch):
    pay(books, *(f"h{number:02}" for number in range(30)))
    books.execute_despite("posting_no_delete", "DELETE FROM posting WHERE transaction_id LIKE 'settle:%'")
    monkeypatch.setattr(audit_module, "PAGE_LENGTH", 7)
    findings = books.audit_now().findings
    assert sum(finding.endswith("has no postings") for finding in findings) == FINDINGS_PER_RULE_MAX


def test_what_is_written_between_two_steps_is_not_held_against_the_books(books, monkeypatch):
    monkeypatch.setattr(audit_module, "PAGE_LENGTH", 4)
    pay(books, *(f"m{number:02}" for number in range(12)))
    books.apply_now(*(open_hold(f"open{number}") for number in range(4)))
    run, step_count, report = AuditRun(books.clock.now_ms), 0, None
    while report is None:
        report = books.run_now(lambda work: run.advance(work.audit))
        step_count += 1
        if step_count <= 20:
            # Behind what was looked at, before it, and in the midst of it.
            pay(books, f"a{step_count:02}", f"m05{step_count:02}", f"z{step_count:02}")
            books.apply_now(SettleHold(f"open{step_count % 4}", 10))
            books.add_people(f"person{step_count}", grant=5)
    assert step_count > 20
    assert report.findings == ()
    assert books.audit_now().findings == ()
