"""Books of before deployments had tiers: what they said is still said afterwards."""

from __future__ import annotations

import json

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from potluck_coordinator.domain.catalogue import Deployment
from tests.support.books import Books, keep_books_of_version
from tests.support.replicas import catalogue_entry

ENTRY = catalogue_entry("tiny")


def old_books(url: str) -> str:
    """A database as the version before wrote it, with one model, whose entry had one engine kind, and a wish for it."""
    old = json.loads(msgspec.json.encode(ENTRY))
    old["engine_kind"] = old.pop("engine_kinds")[0]
    for later in ("architecture", "quantization", "repository", "unchecked"):
        del old[later]
    keep_books_of_version(
        url,
        "0002",
        "INSERT INTO catalogue_model VALUES ('tiny', :entry)",
        "INSERT INTO deployment VALUES ('tiny', 2)",
        entry=json.dumps(old),
    )
    return url


def test_models_and_wishes_are_kept(empty_database_url):
    books = Books(old_books(empty_database_url))
    try:
        assert books.run_now(lambda work: work.catalogue.entries()) == {ENTRY.model_id: ENTRY}
        assert books.run_now(lambda work: work.catalogue.deployments()) == (Deployment(ENTRY.model_id, 2),)
        assert books.run_now(lambda work: work.catalogue.origins()) == {ENTRY.model_id: "file"}
        assert books.run_now(lambda work: work.plan.all()) == {}
    finally:
        books.store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE deployment SET tier = 'gold'",
        "UPDATE deployment SET replica_count = -1",
        "UPDATE catalogue_model SET origin = 'nowhere'",
        "INSERT INTO deployment VALUES ('gone', 1, 'flex')",
    ],
)
def test_the_database_refuses_what_no_wish_can_be(empty_database_url, statement):
    books = Books(old_books(empty_database_url))
    try:
        with pytest.raises(IntegrityError):
            books.run_now(lambda work: work.audit._connection.execute(text(statement)))
    finally:
        books.store.close()
