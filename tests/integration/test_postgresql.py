"""A store on PostgreSQL: one coordinator on its database, and a server that goes away, stands still and comes back."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest

from potluck_coordinator.directory import directory as directory_module
from potluck_coordinator.directory.directory import Directory
from potluck_coordinator.domain.ledger import LedgerOutcome, SettleHold
from potluck_coordinator.settings import Settings
from potluck_coordinator.storage import postgresql as postgresql_module
from potluck_coordinator.storage import store as store_module
from potluck_coordinator.storage.absence import DatabaseAwayError, ReplacedError
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.store import Store
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import ReplicaId
from tests.integration.test_node_desk import node_desk
from tests.support.books import Books, open_books, open_hold
from tests.support.postgresql import Cluster, cluster

APPLIED = LedgerOutcome.APPLIED


@pytest.fixture(scope="module")
def own_server():
    """One that may be stopped and frozen, for no other test is on it."""
    with cluster() as started:
        yield started


@pytest.fixture
def books(own_server):
    name = own_server.new_database()
    with open_books(own_server.url(name)) as opened:
        opened.add_people("ann", "bob")
        yield opened
    own_server.drop(name)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(postgresql_module, "LOCK_PATIENCE_SECONDS", 0.3)


def until_back(books: Books, seconds_max: float = 20.0):
    """Pays once more, as soon as the database lets it; the outcome."""
    give_up_at = time.monotonic() + seconds_max
    while True:
        try:
            return books.apply_now(open_hold(f"h{time.monotonic_ns()}", amount=1))
        except DatabaseAwayError:
            assert time.monotonic() < give_up_at
            time.sleep(0.05)


@dataclass
class Way:
    """How a server is taken away, and given back."""

    server: Cluster

    @contextmanager
    def stopped(self):
        self.server.stop()
        yield
        self.server.start()

    @contextmanager
    def crashed(self):
        self.server.crash()
        yield
        self.server.start()

    @contextmanager
    def killed(self):
        self.server.kill()
        yield
        self.server.start()

    @contextmanager
    def made_read_only(self):
        """As whoever runs it does when its disk is full, or another server takes over; sessions go on."""
        self._set_read_only("on")
        yield
        self._set_read_only("off")

    def _set_read_only(self, word):
        with self.server.connect("postgres") as connection:
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {word}")
            connection.execute("SELECT pg_reload_conf()")
            while connection.execute("SHOW default_transaction_read_only").fetchone() != (word,):
                time.sleep(0.02)
        time.sleep(0.1)  # the coordinator's own session has the same signal to read


@pytest.mark.parametrize("how", ["stopped", "crashed", "killed", "made_read_only"])
def test_while_the_server_is_away_units_fail_at_once_and_then_the_store_goes_on(books, own_server, how):
    assert books.apply_now(open_hold("before", amount=1)) == (APPLIED,)
    with getattr(Way(own_server), how)():
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(DatabaseAwayError) as away:
                books.apply_now(open_hold("during", amount=1))
            assert time.monotonic() - started < 2
            assert (away.value.code, away.value.retry_after_seconds) == (ErrorCode.COORDINATOR_UNAVAILABLE, 2)
            time.sleep(store_module.RECONNECT_PAUSE_SECONDS)
        assert books.store.there_seconds == 0
    assert until_back(books) == (APPLIED,)
    assert books.store.there_seconds < 20
    # What was refused may be asked again, as it was: a hold that was opened answers so, and another is opened now.
    assert books.apply_now(open_hold("before", amount=1), open_hold("during", amount=1)) == (APPLIED, APPLIED)
    assert books.audit_now().findings == ()


def test_a_server_that_stands_still_is_noticed_and_a_frozen_commit_is_not_acknowledged(books, own_server, monkeypatch):
    monkeypatch.setattr(store_module, "SILENCE_SECONDS_MAX", 0.5)
    with own_server.frozen():
        started = time.monotonic()
        with pytest.raises(DatabaseAwayError, match="look whether it took effect"):
            books.run_now(lambda work: work.state.advance(StateName.DESIRED_REVISION))
        assert time.monotonic() - started < 3
        with pytest.raises(DatabaseAwayError, match="try again"):
            books.apply_now(open_hold("during", amount=1))
        assert time.monotonic() - started < 3 + postgresql_module.CONNECT_SECONDS_MAX + 2
    assert until_back(books) == (APPLIED,)
    assert books.audit_now().findings == ()


def test_a_lost_session_fails_all_who_shared_the_commit_and_none_is_half_done(books, own_server):
    def cut(work):
        books.store._database.sever()

    async def run():
        units = [books.store.run(books.ledger.work_for([open_hold(f"h{number}", amount=1)])) for number in range(5)]
        return await asyncio.gather(*units, books.store.run(cut), return_exceptions=True)

    outcomes = asyncio.run(run())
    assert any(isinstance(outcome, DatabaseAwayError) for outcome in outcomes)
    until_back(books)
    for number, outcome in enumerate(outcomes[:5]):
        hold = books.run_now(lambda work, number=number: work.holds.get(f"h{number}"))
        assert isinstance(outcome, DatabaseAwayError) or hold is not None
    assert books.audit_now().findings == ()


def test_a_second_coordinator_says_who_has_the_database(books, impatient):
    second = Store(_url(books))
    with pytest.raises(
        PotluckError, match=rf"Another coordinator \(potluck coordinator, process {os.getpid()} on .*since .*stop it first"
    ) as refused:
        second.migrate()
    second.close()
    assert refused.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    books.store.close()
    third = Store(_url(books))
    third.migrate()
    third.close()


def test_whoever_lost_the_database_to_another_never_writes_again(books):
    assert books.store.begin_term(None) == 1
    books.apply_now(open_hold("h1"))
    books.store._database.sever()
    second = Books(_url(books))
    try:
        with pytest.raises(DatabaseAwayError):
            books.apply_now(SettleHold("h1", 10))
        time.sleep(store_module.RECONNECT_PAUSE_SECONDS)
        with pytest.raises(DatabaseAwayError):
            books.apply_now(SettleHold("h1", 10))
        books.store.check()
        assert second.store.begin_term(None) == 2
        time.sleep(store_module.RECONNECT_PAUSE_SECONDS)
        with pytest.raises(ReplacedError):
            books.apply_now(SettleHold("h1", 10))
    finally:
        second.store.close()
    # Nor when the other is gone.
    with pytest.raises(ReplacedError):
        books.apply_now(SettleHold("h1", 10))
    with pytest.raises(ReplacedError):
        books.store.check()
    # A directory that starts again for the same run finds out at once; one for a new run goes on.
    again = Store(_url(books))
    again.migrate()
    with pytest.raises(ReplacedError):
        again.begin_term(1)
    assert again.begin_term(None) == 3
    again.close()


async def test_of_two_directories_on_one_database_one_settles(own_server, tmp_path, impatient, monkeypatch):
    monkeypatch.setattr(directory_module, "CHORES_SECONDS", 0.05)
    url = own_server.url(own_server.new_database())

    def settings(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return Settings(data_dir=tmp_path / name, database_url=url, grant_credits=1)

    first = await Directory.open(settings("first"), SystemClock())
    with pytest.raises(PotluckError, match="Another coordinator"):
        await Directory.open(settings("second"), SystemClock())
    grant = await first.pool.register_gateway(0)
    account = await first.accounts.create_account("ann")
    hold = open_hold("h1", payer=account.account_id, payees={account.account_id: 1}, epoch=grant.epoch, expires_in_ms=10**12)
    assert await first.ledger.apply([hold]) == (APPLIED,)
    chores = asyncio.ensure_future(first.run_background())
    first._store._database.sever()
    second = await Directory.open(settings("second"), SystemClock())
    assert (first.term, second.term) == (1, 2)
    await second.pool.register_gateway(0)
    with pytest.raises(PotluckError):
        await first.ledger.apply([SettleHold("h1", 50)])
    with pytest.raises(ReplacedError):
        await asyncio.wait_for(chores, 10)
    assert await second.ledger.apply([SettleHold("h1", 50)]) == (LedgerOutcome.CONFLICT,), "it ended at its mark"
    assert (await second.ledger.audit()).findings == ()
    first.close()
    second.close()


def test_the_password_comes_from_its_file_and_is_never_shown(own_server, tmp_path, monkeypatch, capsys):
    name = own_server.new_database()
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    wrong = own_server.url_by_network(name).replace("keeper@", "keeper:wr0ng-secret@")
    for url, reason in ((own_server.url_by_network(name), "no password supplied"), (wrong, "password authentication failed")):
        store = Store(url)
        with pytest.raises(PotluckError, match=reason) as failure:
            store.migrate()
        store.close()
        assert f"127.0.0.1:{own_server.port}/{name}" in failure.value.message
        said = capsys.readouterr()
        assert "wr0ng-secret" not in failure.value.message + said.out + said.err
    password_file = tmp_path / "pgpass"
    password_file.write_text(f"127.0.0.1:{own_server.port}:*:keeper:{own_server.password}\n")
    password_file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(password_file))
    store = Store(own_server.url_by_network(name))
    store.migrate()
    assert store.begin_term(None) == 1
    store.close()
    assert own_server.password not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("option", "reason"),
    [("ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0", "it is encoded in LATIN1"), (None, "does not exist")],
)
def test_a_database_that_cannot_be_used_is_said_to_be_so(own_server, option, reason):
    if option is not None:
        with own_server.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE odd {option} LOCALE_PROVIDER libc")
    store = Store(own_server.url("odd" if option is not None else "nowhere"))
    with pytest.raises(PotluckError, match=reason):
        store.migrate()
    store.close()


def test_what_one_unit_may_not_write_costs_no_other_its_commit(books):
    """SQLite keeps a text with a zero byte, PostgreSQL none."""

    async def run():
        good = [books.store.run(books.ledger.work_for([open_hold(f"h{number}", amount=1)])) for number in range(3)]
        bad = books.store.run(lambda work: work.state.put(StateName.POOL_ID, "a\0b"))
        return await asyncio.gather(*good, bad, return_exceptions=True)

    there_seconds = books.store.there_seconds
    *outcomes, refused = asyncio.run(run())
    assert outcomes == [(APPLIED,)] * 3
    assert "NUL" in str(refused)
    assert books.store.there_seconds > there_seconds, "it was not held to be away"


async def test_a_plan_of_ten_thousand_is_written_well_before_the_database_is_held_to_be_silent(own_server):
    async with node_desk(own_server.url(own_server.new_database()), "a") as (books, _, _):
        ((replica_id, one),) = books.run_now(lambda work: work.plan.all()).items()
        many = {ReplicaId(f"a/{number}"): replace(one, replica_id=ReplicaId(f"a/{number}")) for number in range(10_000)}
        books.run_now(lambda work: work.plan.keep({replica_id: one}, many))
        changed = {name: replace(each, made_for="changed") for name, each in many.items()}
        books.run_now(lambda work: work.plan.keep(many, changed))
        assert books.run_now(lambda work: work.plan.all()) == changed


def _url(books: Books) -> str:
    return books.store._database._engine.url.render_as_string(hide_password=False)
