"""Books of before nodes were trusted: their nodes are still there, and none is trusted until the operator says so."""

from __future__ import annotations

from potluck_coordinator.storage.nodes import NodeStatus
from potluck_protocol.values import NodeId
from tests.support.books import Books, keep_books_of_version

DEN = NodeId("den")


def old_books(url: str) -> str:
    """A database as the version before wrote it, with one node."""
    keep_books_of_version(
        url,
        "0008",
        "INSERT INTO account VALUES ('ann', 'Ann', FALSE, 1)",
        "INSERT INTO node VALUES ('den', 'ann', 'den', :spki, 'active', '', 3, '{}', '0.1', 10, 20)",
        spki=b"\0",
    )
    return url


def test_no_node_is_trusted_until_it_is_said_and_none_any_more_that_has_left(empty_database_url):
    books = Books(old_books(empty_database_url))
    try:
        assert books.run_now(lambda work: (work.nodes.get(DEN).epoch, work.nodes.trusted())) == (3, frozenset())
        for _ in range(2):
            books.run_now(lambda work: work.nodes.trust(DEN, 30))
        assert books.run_now(lambda work: work.nodes.trusted()) == {DEN}
        for _ in range(2):
            books.run_now(lambda work: work.nodes.distrust(DEN))
        assert books.run_now(lambda work: work.nodes.trusted()) == frozenset()
        books.run_now(lambda work: work.nodes.trust(DEN, 40))
        assert books.run_now(lambda work: work.nodes.end(DEN, NodeStatus.LEFT, "moved"))
        assert books.run_now(lambda work: work.nodes.trusted()) == frozenset()
    finally:
        books.store.close()
