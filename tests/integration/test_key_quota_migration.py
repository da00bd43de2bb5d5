"""Books of before keys had quotas: their keys are still good, and have no bound."""

from __future__ import annotations

from potluck_coordinator.desks import KeyRecord
from potluck_coordinator.domain.quotas import NO_QUOTAS, KeyDay, KeyQuotas
from potluck_coordinator.domain.tiers import PromiseCount
from potluck_coordinator.storage.keys import StoredKey
from potluck_protocol.values import AccountId, KeyPrefix
from tests.support.books import Books, keep_books_of_version

OLD = KeyRecord(KeyPrefix("abcdefgh"), AccountId("ann"), "laptop", 10, 20, revoked=True, operator=False)


def old_books(url: str) -> str:
    """A database as the version before wrote it, with one key."""
    keep_books_of_version(
        url,
        "0006",
        "INSERT INTO account VALUES ('ann', 'Ann', FALSE, 1)",
        "INSERT INTO api_key VALUES ('abcdefgh', 'ann', 'laptop', 'hash', 10, 20, TRUE)",
    )
    return url


def test_keys_are_kept_and_have_no_bound_until_they_get_one(empty_database_url):
    books = Books(old_books(empty_database_url))
    try:
        assert books.run_now(lambda work: work.keys.get(OLD.key_prefix)) == StoredKey(OLD, "hash")
        assert OLD.quotas == NO_QUOTAS
        books.run_now(lambda work: work.keys.set_quotas(OLD.key_prefix, KeyQuotas(1, 2, 3, 4)))
        assert books.run_now(lambda work: work.keys.list_of(OLD.account_id))[0].quotas == KeyQuotas(1, 2, 3, 4)
    finally:
        books.store.close()


def test_hours_of_the_promise_add_up_and_old_ones_go(empty_database_url):
    books = Books(old_books(empty_database_url))
    try:
        for hour, count in ((1000, 1), (1000, 2), (1001, 4), (1000 + 720, 8)):
            books.run_now(lambda work, hour=hour, count=count: work.promise.add(hour, PromiseCount(count, 1)))
        assert books.run_now(lambda work: work.promise.hours()) == {1001: PromiseCount(4, 1), 1720: PromiseCount(8, 1)}
    finally:
        books.store.close()


def test_a_keys_days_add_up_and_its_old_ones_go(empty_database_url):
    books = Books(old_books(empty_database_url))
    try:
        for more in (KeyDay(1, 0.5, 7), KeyDay(-1, 2.0, 0)):
            books.run_now(lambda work, more=more: work.key_days.add(OLD.key_prefix, 1000, more))
        assert books.run_now(lambda work: work.key_days.of(1000)) == {(OLD.key_prefix, 1000): KeyDay(0, 2.5, 7)}
        assert books.run_now(lambda work: work.key_days.of(1001)) == {}
        books.run_now(lambda work: work.key_days.add(OLD.key_prefix, 1001, KeyDay(3)))
        assert books.run_now(lambda work: work.key_days.of(1001)) == {(OLD.key_prefix, 1001): KeyDay(3)}
        assert books.run_now(lambda work: work.key_days.of(1000)) == {}
    finally:
        books.store.close()
