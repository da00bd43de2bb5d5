"""Books of before deployments had tiers: what they said is still said afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from potluck_coordinator.domain.catalogue import Deployment
from potluck_coordinator.storage import schema
from potluck_coordinator.storage.store import Store
from tests.support.books import Books
from tests.support.replicas import catalogue_entry

ENTRY = catalogue_entry("tiny")


def old_books(path: Path) -> str:
    """A database as the version before wrote it, with one model, whose entry had one engine kind, and a wish for it."""
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).with_name("migrations")))
    url = f"sqlite:///{path}"
    old = json.loads(msgspec.json.encode(ENTRY))
    old["engine_kind"] = old.pop("engine_kinds")[0]
    for later in ("architecture", "quantization", "repository", "unchecked"):
        del old[later]
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.execute(text("INSERT INTO catalogue_model VALUES ('tiny', :entry)"), {"entry": json.dumps(old)})
        connection.execute(text("INSERT INTO deployment VALUES ('tiny', 2)"))
    engine.dispose()
    return url


def test_models_and_wishes_are_kept(tmp_path):
    books = Books(old_books(tmp_path / "old.db"))
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
def test_the_database_refuses_what_no_wish_can_be(tmp_path, statement):
    url = old_books(tmp_path / "old.db")
    store = Store(url)
    store.migrate()
    store.close()
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        with pytest.raises(IntegrityError):
            connection.execute(text(statement))
    engine.dispose()
