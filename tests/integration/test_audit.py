"""The audit goes through the books in steps, and payments go on between them."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from sqlalchemy import text

from potluck_coordinator.desks import Progress
from potluck_coordinator.directory import ledger as ledger_module
from potluck_coordinator.domain.ledger import LedgerOutcome, MarkDelivered, SettleHold
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
    books.apply_now(*(open_hold(f"{letter}-open{number}") for letter in "amz" for number in range(10)))
    run, written, report = AuditRun(books.clock.now_ms), Counter(), None
    while report is None:
        report = books.run_now(lambda work: run.advance(work.audit))
        walk = len(run._walks)
        if report is None and written[walk] < 10:
            number = 10 * walk + written[walk]
            written[walk] += 1
            # Before what was looked at, in the midst of it, and behind it; by turns, so that each walk comes to its end.
            pay(books, f"{'amz'[number % 3]}{number:02}")
            books.apply_now(SettleHold(f"{'amz'[number % 3]}-open{number % 10}", 10), MarkDelivered(f"z-open{number % 10}", 5))
            books.add_people(f"person{number}", grant=5)
    assert written == {2: 10, 1: 10, 0: 1}, "in both walks, and before the accounts"
    assert report.findings == ()
    assert books.audit_now().findings == ()


async def test_whoever_asks_while_an_audit_runs_waits_for_that_one(books, monkeypatch):
    monkeypatch.setattr(audit_module, "PAGE_LENGTH", 2)
    monkeypatch.setattr(ledger_module, "AUDIT_PATIENCE_SECONDS", 0)
    pay(books, *(f"h{number:02}" for number in range(12)))
    first, second = await asyncio.gather(books.ledger.audit(), books.ledger.audit())
    assert isinstance(first, Progress)
    assert isinstance(second, Progress)
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "audit"]
    await task
    assert (await books.ledger.audit()) == books.audit_now()


async def test_a_report_that_nobody_came_for_is_not_given_to_whoever_asks_later(books, monkeypatch):
    monkeypatch.setattr(ledger_module, "AUDIT_PATIENCE_SECONDS", 0)
    assert isinstance(await books.ledger.audit(), Progress)
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "audit"]
    early = await task
    pay(books, "h1")
    books.clock.advance(ledger_module.AUDIT_KEPT_SECONDS)
    monkeypatch.setattr(ledger_module, "AUDIT_PATIENCE_SECONDS", 5)
    assert (await books.ledger.audit()).posting_count == early.posting_count + 3


def test_postgresql_finds_a_steps_partners_by_their_keys(postgresql):
    """Its planner would rather join by hash with the whole of a table, as soon as there is some hundred times as much in it."""
    with open_books(postgresql.url(postgresql.new_database()), grant=10**9) as books:
        books.add_people("ann", "bob", grant=10**9)
        for hundreds in range(30):
            pay(books, *(f"h{hundreds:03}{number:02}" for number in range(100)))
        books.execute("ANALYZE")

        def plans(work) -> list[str]:
            work.audit.go_by_keys()
            bounds = {"after": "h00100", "until": "h02900"}
            page = Page(**bounds)
            queries = [*(query for _, query in (*_OF_TRANSACTIONS, *_OF_HOLDS)), _LINES, _EARNINGS]
            connection = work.audit._connection
            return [line for query in queries for (line,) in connection.execute(text(f"EXPLAIN {within(query, page)}"), bounds)]

        lines = books.run_now(plans)
    assert any("Index" in line for line in lines)
    assert not any("Hash Join" in line or "Merge Join" in line or "Hash Left" in line for line in lines), lines
    assert not any("Seq Scan on posting" in line or "Seq Scan on ledger_transaction" in line for line in lines), lines
