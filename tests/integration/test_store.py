"""The store: transactions, group commit, and what the database itself refuses."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from potluck_coordinator.storage import holds
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.store import Store
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.books import open_books, open_hold


@pytest.fixture
def books(database_url):
    with open_books(database_url) as opened:
        opened.add_people("ann", "bob")
        yield opened


@pytest.fixture
def sqlite_books(tmp_path):
    with open_books(f"sqlite:///{tmp_path / 'potluck.db'}") as opened:
        opened.add_people("ann", "bob")
        yield opened


def test_migrating_again_changes_nothing_and_a_newer_schema_is_refused(books):
    books.store.migrate()
    assert books.run_now(lambda work: work.accounts.get("ann")).name == "ann"
    books.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(PotluckError, match="newer") as refused:
        books.store.migrate()
    assert refused.value.code is ErrorCode.INTERNAL_ERROR


def test_a_second_process_on_the_same_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "potluck_coordinator.storage.sqlite._PRAGMAS",
        ("PRAGMA busy_timeout = 50", "PRAGMA locking_mode = EXCLUSIVE", "PRAGMA journal_mode = WAL"),
    )
    with open_books(f"sqlite:///{tmp_path / 'potluck.db'}"):
        second = Store(f"sqlite:///{tmp_path / 'potluck.db'}")
        with pytest.raises(PotluckError, match="Another process") as refused:
            second.migrate()
        second.close()
    assert refused.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    third = Store(f"sqlite:///{tmp_path / 'potluck.db'}")
    third.migrate()
    third.close()


@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        ("synchronous", 2),  # FULL: what was acknowledged survives the loss of power
        ("foreign_keys", 1),
        ("recursive_triggers", 1),
        ("journal_mode", "wal"),
        ("locking_mode", "exclusive"),
    ],
)
def test_the_connection_that_writes_is_a_careful_one(sqlite_books, pragma, value):
    assert sqlite_books.rows(f"PRAGMA {pragma}") == [(value,)]


async def test_a_failing_unit_undoes_itself_and_none_of_those_it_shares_a_commit_with(books):
    def failing(work):
        work.state.put(StateName.POOL_ID, "half done")
        raise LookupError("on purpose")

    entered, leave = threading.Event(), threading.Event()

    def blocking(work):
        entered.set()
        assert leave.wait(10)

    blocked = asyncio.ensure_future(books.store.run(blocking))
    await asyncio.to_thread(entered.wait, 10)
    units = [asyncio.ensure_future(books.store.run(lambda work: work.state.advance(StateName.GATEWAY_EPOCH))) for _ in range(5)]
    units.insert(2, asyncio.ensure_future(books.store.run(failing)))
    await asyncio.sleep(0)  # all of them wait now, behind the blocked one
    leave.set()
    results = await asyncio.gather(*units, return_exceptions=True)
    await blocked
    assert isinstance(results.pop(2), LookupError)
    assert results == [1, 2, 3, 4, 5]
    assert await books.store.run(lambda work: work.state.get(StateName.POOL_ID)) is None


async def test_a_cancelled_caller_does_not_stop_the_store(books):
    entered, leave = threading.Event(), threading.Event()

    def blocking(work):
        entered.set()
        assert leave.wait(10)

    running = asyncio.ensure_future(books.store.run(blocking))
    await asyncio.to_thread(entered.wait, 10)
    waiting = asyncio.ensure_future(books.store.run(lambda work: work.state.advance(StateName.DESIRED_REVISION)))
    await asyncio.sleep(0)
    running.cancel()
    waiting.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    leave.set()
    assert await books.store.run(lambda work: work.state.counter(StateName.DESIRED_REVISION)) == 0


def test_a_full_disk_refuses_whole_groups_and_loses_nothing_acknowledged(sqlite_books):
    sqlite_books.apply_now(open_hold("before", amount=1))
    sqlite_books.execute("PRAGMA max_page_count = 1")  # it cannot shrink: the file is full as it stands

    def pay(number):
        try:
            return sqlite_books.apply_now(open_hold(f"h{number}", amount=1)) and None
        except PotluckError as error:
            return error.code

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(pay, range(300)))
    assert set(outcomes) == {None, ErrorCode.COORDINATOR_UNAVAILABLE}
    sqlite_books.execute("PRAGMA max_page_count = 1000000")
    sqlite_books.apply_now(open_hold("after", amount=1))
    assert sqlite_books.audit_now().findings == ()
    kept = sqlite_books.run_now(lambda work: [work.holds.get(f"h{number}") is not None for number in range(300)])
    assert kept == [outcome is None for outcome in outcomes]


def test_a_closed_store_refuses_and_may_be_closed_again(books):
    books.store.close()
    with pytest.raises(PotluckError, match="stopping"):
        books.run_now(lambda work: None)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE posting SET amount = amount + 1", "never changed"),
        ("DELETE FROM posting", "never deleted"),
        ("INSERT INTO posting SELECT transaction_id, line + 9, ledger_account_id, amount, 0 FROM posting", "no more postings"),
        ("INSERT INTO posting VALUES ('grant:ann', 9, 'user:bob', 5, 0)", "no more postings"),
        ("UPDATE ledger_transaction SET created_at_unix_ms = 0", "never changed"),
        ("DELETE FROM ledger_transaction", "never deleted"),
        ("INSERT INTO ledger_transaction VALUES ('empty', 'grant', '', 0)", "sum to zero"),
        ("UPDATE ledger_account SET held = posted + 1 WHERE kind = 'user'", "overdrawn"),
        ("UPDATE ledger_account SET held = -1", "held"),
        ("UPDATE hold SET settled = amount + 1", "hold_settled"),
        ("UPDATE hold SET amount = amount + 1", "leaves open once"),
        ("UPDATE hold SET delivered = 9; ", None),
        ("UPDATE hold SET state = 'settled'", "hold_closed_at"),
        ("DELETE FROM hold", "never deleted"),
        ("INSERT INTO node_uptime_hour VALUES ('n', 1, 60, 1)", "node_uptime_hour_minutes"),
    ],
)
def test_the_database_refuses_what_would_falsify_the_books(books, statement, reason):
    books.apply_now(open_hold("h1"))
    if reason is None:
        books.execute(statement.strip("; "))
        return
    with pytest.raises(IntegrityError, match=reason):
        books.execute(statement)
    assert books.audit_now().findings == ()


def test_replacing_a_row_is_deleting_it(sqlite_books):
    with pytest.raises(IntegrityError, match="postings"):
        sqlite_books.execute("REPLACE INTO posting SELECT transaction_id, line, ledger_account_id, amount + 1, 0 FROM posting")
    assert sqlite_books.audit_now().findings == ()


def test_the_database_refuses_a_transaction_that_does_not_balance(books):
    def unbalanced(work):
        for line, amount in enumerate((-5, 4)):
            work.audit._connection.execute(text(f"INSERT INTO posting VALUES ('t', {line}, 'fee', {-amount}, 0)"))
        work.audit._connection.execute(text("INSERT INTO ledger_transaction VALUES ('t', 'grant', '', 0)"))

    with pytest.raises(IntegrityError, match="sum to zero"):
        books.run_now(unbalanced)
    assert books.audit_now().findings == ()


def test_the_database_refuses_postings_that_no_transaction_seals(books):
    with pytest.raises(IntegrityError, match=r"FOREIGN KEY|foreign key"):
        books.execute("INSERT INTO posting VALUES ('unsealed', 0, 'fee', 5, 0)")
    assert books.audit_now().findings == ()


def test_the_database_lets_a_hold_leave_open_once(books):
    books.apply_now(open_hold("h1"))
    close = "UPDATE hold SET state = '{}', settled = 0, closed_at_unix_ms = 1"
    books.execute(close.format("expired"))
    for state in ("settled", "expired", "open"):
        with pytest.raises(IntegrityError, match="leaves open once"):
            books.execute(close.format(state))


@pytest.mark.parametrize(
    ("tampering", "finding"),
    [
        (
            "UPDATE ledger_account SET posted = posted + 1 WHERE ledger_account_id = 'fee'",
            "account fee says 1 posted, its postings sum to 0",
        ),
        ("UPDATE ledger_account SET held = held + 1 WHERE ledger_account_id = 'user:ann'", "account user:ann says 101 held"),
        (
            "posting_no_update; UPDATE posting SET amount = 7 WHERE ledger_account_id = 'user:ann'",
            "transaction grant:ann has 2 postings",
        ),
        (
            "posting_no_update; UPDATE posting SET amount = amount * 2 WHERE transaction_id = 'grant:ann'",
            "grant:ann is not what was booked",
        ),
        (
            "hold_once; UPDATE hold SET state = 'settled', settled = 3, closed_at_unix_ms = 1",
            "hold h1 settled 3, its payer's account was charged 0",
        ),
    ],
)
def test_the_audit_finds_what_was_changed_behind_the_ledgers_back(books, tampering, finding):
    books.apply_now(open_hold("h1"))

    if "; " in tampering:
        books.execute_despite(*tampering.split("; "))
    else:
        books.execute(tampering)
    assert any(finding in found for found in books.audit_now().findings), books.audit_now().findings


def test_an_accounts_newest_lines_are_found_without_sorting_all_of_them(sqlite_books):
    plan = sqlite_books.rows(
        "EXPLAIN QUERY PLAN SELECT * FROM posting p JOIN ledger_transaction t ON p.transaction_id = t.transaction_id"
        " WHERE p.ledger_account_id = 'user:ann' ORDER BY p.created_at_unix_ms DESC LIMIT 5",
    )
    assert not any("TEMP B-TREE" in step[3] for step in plan), plan


@pytest.mark.parametrize("query", [holds._OVERDUE, holds._ORPHANED])
def test_open_holds_are_found_among_all_others_by_their_index(sqlite_books, query):
    asked = f"EXPLAIN QUERY PLAN {query}", {"now": 1, "count_max": 1}
    plan = sqlite_books.run_now(lambda work: work.audit._connection.exec_driver_sql(*asked).all())
    assert "ix_hold_open" in plan[0][3], plan


def test_uptime_hours_hold_at_most_sixty_minutes(books):
    books.run_now(lambda work: work.nodes.add(_node("n1")))
    for _ in range(70):
        books.run_now(lambda work: work.uptime.add(5, {"n1": (1, 0)}))
    books.run_now(lambda work: work.uptime.add(6, {"n1": (0, 2)}))
    assert books.run_now(lambda work: work.uptime.totals()) == {"n1": (60, 2)}
    assert books.run_now(lambda work: work.uptime.totals(since_hour=6)) == {"n1": (0, 2)}


def test_node_epochs_only_rise_and_only_for_active_nodes(books):
    from potluck_coordinator.storage.nodes import NodeStatus

    books.run_now(lambda work: work.nodes.add(_node("n1")))
    hello = (_node("n1").inventory, "0.1.0")

    def begin(*names):
        return books.run_now(lambda work: work.nodes.begin_sessions(dict.fromkeys(names, hello), 6))

    assert [begin("n1")["n1"].epoch for _ in range(3)] == [1, 2, 3]
    assert books.run_now(lambda work: work.nodes.get("n1")) == _node("n1", epoch=3)
    assert books.run_now(lambda work: work.nodes.end("n1", NodeStatus.REVOKED, "stolen"))
    assert begin("n1", "nobody") == {}
    assert not books.run_now(lambda work: work.nodes.end("n1", NodeStatus.LEFT, "went"))


def _node(node_id, epoch=0):
    from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
    from potluck_protocol.values import Accelerator, Inventory

    inventory = Inventory("Linux", 8, 1 << 34, 1 << 40, (Accelerator("RTX 3090", "GPU-1", 24 << 30),))
    return EnrolledNode(node_id, "ann", "box", b"key", NodeStatus.ACTIVE, "", epoch, inventory, "0.1.0", 5, 6)


@pytest.mark.parametrize("url", ["nonsense://joe:secretpw", "postgresql+nodriver://joe:secretpw@h/d", "mysql://joe:secretpw@h:port/d"])
def test_a_url_that_cannot_be_used_is_explained_without_its_password(url):
    with pytest.raises(PotluckError) as failure:
        Store(url)
    assert failure.value.code is ErrorCode.INVALID_REQUEST
    assert "secretpw" not in failure.value.message
