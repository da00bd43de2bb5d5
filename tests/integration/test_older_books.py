"""A database that comes back without what was committed to it last."""

from __future__ import annotations

import time

import pytest
from structlog.testing import capture_logs

from potluck_coordinator.actors import DirectoryActor
from potluck_coordinator.directory.directory import Directory
from potluck_coordinator.settings import Settings
from potluck_coordinator.storage import store as store_module
from potluck_coordinator.storage.absence import FellBackError
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.store import Store
from tests.integration.test_postgresql import APPLIED, until_back
from tests.support.books import Books, open_books, open_hold


@pytest.fixture
def books(postgresql):
    with postgresql.fresh_url() as url, open_books(url) as opened:
        opened.add_people("ann", "bob")
        yield opened


@pytest.mark.parametrize("name", [StateName.COORDINATOR_TERM, StateName.GATEWAY_EPOCH, StateName.DESIRED_REVISION])
def test_a_database_that_comes_back_with_older_books_is_not_written_to(postgresql, books, name):
    """As a standby does that takes over before it has heard of everything."""

    def fail(work):
        work.state.advance(name)
        raise LookupError("on purpose")

    def set_back(number):
        with postgresql.connect(_name(books)) as connection:
            connection.execute("UPDATE coordinator_state SET value = %s WHERE name = %s", (str(number), name))

    term = books.store.begin_term(None)
    if name is not StateName.COORDINATOR_TERM:
        assert [books.run_now(lambda work: work.state.advance(name)) for _ in range(3)] == [1, 2, 3]
    newest = books.run_now(lambda work: work.state.counter(name))
    with pytest.raises(LookupError):
        books.run_now(fail)
    books.store._database.sever()
    assert until_back(books) == (APPLIED,), "the books are the same, and what failed counts for nothing"
    set_back(newest - 1)
    books.store._database.sever()
    with capture_logs() as lines:
        with pytest.raises(FellBackError, match="came back with older books"):
            until_back(books)
        for _ in range(2):
            time.sleep(store_module.RECONNECT_PAUSE_SECONDS)
            with pytest.raises(FellBackError):
                books.apply_now(open_hold("h2", amount=1))
    with pytest.raises(FellBackError):
        books.store.check()
    (line,) = [line for line in lines if line["event"] == "database_fell_back"]
    assert (line["committed"][name], line["found"][name]) == (newest, newest - 1)
    # Whoever begins a term of its own goes on with the books as they are; a directory that starts again for this one may not.
    again = Store(postgresql.url(_name(books)))
    if name is StateName.COORDINATOR_TERM:
        with pytest.raises(FellBackError):
            again.begin_term(term)
    assert again.begin_term(None) >= term
    again.close()


async def test_a_directory_whose_books_fell_back_is_not_opened_again_in_the_same_run(tmp_path, monkeypatch):
    opened = []

    async def fall_back(*_):
        opened.append(1)
        raise FellBackError

    monkeypatch.setattr(Directory, "open", fall_back)
    actor = DirectoryActor.__new__(DirectoryActor)
    actor._settings, actor._desk_socket = Settings(data_dir=tmp_path), tmp_path / "desks"
    for _ in range(2):
        with pytest.raises(FellBackError):
            await actor._serve()
    assert len(opened) == 1


def _name(books: Books) -> str:
    return books.store._database._engine.url.database
