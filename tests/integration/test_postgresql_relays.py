"""A store on PostgreSQL behind a relay that keeps things to itself: the answer to a commit, or all answers after a welcome."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time

import pytest

from potluck_coordinator.domain.ledger import SettleHold
from potluck_coordinator.storage import store as store_module
from potluck_coordinator.storage.absence import DatabaseAwayError
from potluck_coordinator.storage.store import Store
from potluck_protocol.errors import PotluckError
from tests.integration.test_postgresql import APPLIED, until_back
from tests.support.books import open_books, open_hold
from tests.support.postgresql import Cluster

READY_FOR_QUERY = b"Z\x00\x00\x00\x05I"
GOODBYE = b"X\x00\x00\x00\x04"


class Relay:
    """A way to the server."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._server_port = port
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        raise NotImplementedError

    def url(self, server: Cluster) -> str:
        """Of a new database, by this way and in the clear."""
        return server.url_by_network(server.new_database()).replace(f":{server.port}/", f":{self.port}/") + "?sslmode=disable"

    def close(self) -> None:
        self._listener.close()


class Muffler(Relay):
    """Once it is told to, it keeps the server's answer to the next COMMIT to itself and cuts both ends."""

    def __init__(self, port: int) -> None:
        self.muffles = threading.Event()
        super().__init__(port)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    (server if source is client else client).sendall(data)
                    if source is client and b"COMMIT" in data and self.muffles.is_set():
                        self.muffles.clear()
                        assert b"COMMIT" in server.recv(65536)
                        return


class Pooler(Relay):
    """As a session pooler whose server is away: once it is told to, it lets a client in, and nothing that is asked then is answered."""

    def __init__(self, port: int) -> None:
        self.holds = threading.Event()
        self.held_count = 0
        """Clients who were let in, and asked in vain."""
        super().__init__(port)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):
            was_let_in, is_held = False, False
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is client and was_let_in and self.holds.is_set() and data != GOODBYE:
                        self.held_count += not is_held
                        is_held = True
                        continue
                    (server if source is client else client).sendall(data)
                    was_let_in = was_let_in or (source is server and data.endswith(READY_FOR_QUERY))


def test_a_commit_of_which_nobody_heard_is_not_made_twice(postgresql, monkeypatch):
    """The server commits, and the connection is gone before it can say so: whoever sends the same commands again gets the same answers."""
    monkeypatch.setenv("PGPASSWORD", postgresql.password)
    way = Muffler(postgresql.port)
    url = way.url(postgresql)
    commands = open_hold("h1", amount=100), SettleHold("h1", 60)
    with open_books(url) as books:
        books.add_people("ann", "bob")
        way.muffles.set()
        with pytest.raises(DatabaseAwayError, match="look whether it took effect"):
            books.apply_now(*commands)
        assert not way.muffles.is_set()
        until_back(books)
        balance = asyncio.run(books.ledger.balance("bob"))
        assert balance.earned_micro_credits == 57, "it was committed"
        assert books.apply_now(*commands) == (APPLIED, APPLIED)
        assert asyncio.run(books.ledger.balance("bob")) == balance
        assert books.audit_now().findings == ()
    way.close()


def test_a_pooler_that_lets_in_and_answers_nothing_is_noticed(postgresql, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", postgresql.password)
    monkeypatch.setattr(store_module, "SILENCE_SECONDS_MAX", 0.5)
    pooler = Pooler(postgresql.port)
    url = pooler.url(postgresql)
    with open_books(url) as books:
        books.add_people("ann", "bob")
        pooler.holds.set()
        books.store._database.sever()
        for held_count in (0, 1, 2):
            started = time.monotonic()
            with pytest.raises(DatabaseAwayError):
                books.apply_now(open_hold("during", amount=1))
            assert time.monotonic() - started < 3
            assert pooler.held_count == held_count
            time.sleep(store_module.RECONNECT_PAUSE_SECONDS)
        pooler.holds.clear()
        assert until_back(books) == (APPLIED,)
        assert books.audit_now().findings == ()
    # Nor is the first connection of a process waited for, of which the driver and SQLAlchemy ask something by themselves.
    pooler.holds.set()
    started = time.monotonic()
    store = Store(url)
    with pytest.raises(PotluckError, match="cannot be used"):
        store.migrate()
    assert time.monotonic() - started < 3
    assert pooler.held_count == 3
    store.close()
    pooler.close()
