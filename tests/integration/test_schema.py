"""The schema: what the migrations build is what the models say, on both databases, and no trigger is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel

from potluck_coordinator.storage import schema, tables  # noqa: F401
from potluck_coordinator.storage.schema import migrate
from tests.support.books import keep_books_of_version, open_books

_SQLITE_SCHEMA = """SELECT type, name, sql FROM sqlite_master
WHERE name NOT LIKE 'alembic%' AND name NOT LIKE 'sqlite_%' AND type <> 'trigger' ORDER BY name"""
_SQLITE_TRIGGERS = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
_POSTGRESQL_TRIGGERS = """SELECT tgname || ' ON ' || tgrelid::regclass, pg_get_triggerdef(t.oid) || pg_get_functiondef(tgfoid)
FROM pg_trigger t WHERE NOT tgisinternal"""
_POSTGRESQL_SCHEMA = (
    """SELECT table_name, column_name, data_type, is_nullable, column_default, ordinal_position FROM information_schema.columns
    WHERE table_schema = 'public' ORDER BY 1, 2""",
    """SELECT conrelid::regclass::text, contype, condeferrable, condeferred, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND contype <> 't' ORDER BY 1, 2, 5""",
    "SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2",
)
REPLACED_ON_POSTGRESQL = {
    "posting_sealed ON posting",
    "posting_counted ON posting",
    "ledger_transaction_balanced ON ledger_transaction",
}
"""By those of 0012, which look at whole statements."""


def built(url: str, build: Callable[[Connection], None], read: Callable[[Connection], object]):
    """What is read of an empty database once it is built; the building is undone."""
    engine = create_engine(url)
    with engine.connect() as connection:
        build(connection)
        found = read(connection)
        connection.rollback()
    engine.dispose()
    return found


def test_migrated_schema_equals_the_models_on_sqlite():
    def read(connection):
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []
        # A table that was renamed has its name in quotes.
        return [(kind, name, sql and "".join(sql.replace('"', "").split())) for kind, name, sql in connection.execute(text(_SQLITE_SCHEMA))]

    by_migration, by_models = built("sqlite://", migrate, read), built("sqlite://", SQLModel.metadata.create_all, read)
    for migrated, modelled in zip(by_migration, by_models, strict=True):
        assert sorted(str(migrated).split(",")) == sorted(str(modelled).split(","))


def test_migrated_schema_equals_the_models_on_postgresql(postgresql):
    def read(connection):
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []
        found = [connection.execute(text(query)).all() for query in _POSTGRESQL_SCHEMA]
        return [[tuple(row) for row in rows if row[0] != "alembic_version"] for rows in found]

    url = postgresql.url(postgresql.new_database(empty=True))
    by_migration, by_models = built(url, migrate, read), built(url, SQLModel.metadata.create_all, read)
    assert by_migration == by_models
    assert ("hold", "amount", "bigint", "NO", None, 4) in by_models[0]


def test_every_check_of_the_models_is_in_the_migrated_tables_by_its_name_and_text(empty_database_url):
    def read(connection):
        inspector = inspect(connection)
        found = {name: inspector.get_check_constraints(name) for name in inspector.get_table_names() if name != "alembic_version"}
        return {(table, check["name"]): " ".join(check["sqltext"].split()) for table, each in found.items() for check in each}

    by_models = built(empty_database_url.replace("potluck.db", "models.db"), SQLModel.metadata.create_all, read)
    assert built(empty_database_url, migrate, read) == by_models
    assert ("hold", "hold_delivered") in by_models


def test_no_migration_loses_or_changes_a_trigger(empty_database_url):
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).with_name("migrations")))
    revisions = [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()][::-1]
    is_sqlite = empty_database_url.startswith("sqlite")
    made, now = {}, {}
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        for revision in revisions:
            command.upgrade(config, revision)
            now = dict(connection.execute(text(_SQLITE_TRIGGERS if is_sqlite else _POSTGRESQL_TRIGGERS)).all())
            made |= {name: sql for name, sql in now.items() if name not in made}
    engine.dispose()
    if is_sqlite:
        assert now == made
        assert {"posting_counted", "ledger_transaction_balanced", "hold_once"} <= now.keys()
    else:
        assert now == {name: sql for name, sql in made.items() if name not in REPLACED_ON_POSTGRESQL}
        assert {"postings_added ON posting", "ledger_transactions_added ON ledger_transaction", "hold_once ON hold"} <= now.keys()


@pytest.mark.parametrize("table", ["posting", "ledger_transaction", "hold", "hold_payee", "account"])
def test_no_table_of_the_books_can_be_emptied_at_once(postgresql, table):
    engine = create_engine(postgresql.url(postgresql.new_database()))
    with engine.connect() as connection, pytest.raises(IntegrityError, match="never emptied"):
        connection.execute(text(f"TRUNCATE {table} CASCADE"))
    engine.dispose()


def test_what_two_sessions_wrote_of_one_transaction_balances_or_is_refused(postgresql):
    """Neither sees the other's postings when it writes; whoever commits last does."""
    engine = create_engine(postgresql.url(postgresql.new_database()))
    with engine.begin() as first:
        first.execute(text("INSERT INTO ledger_account VALUES ('issuer', NULL, 'issuer', 0, 0), ('fee', NULL, 'fee', 100, 0)"))
    with engine.connect() as late:
        late.execute(text("INSERT INTO posting VALUES ('t', 8, 'issuer', 7, 0)"))
        with engine.begin() as sealing:
            # The late one has the issuer's row locked: these move two other accounts.
            sealing.execute(text("INSERT INTO account VALUES ('a', 'a', FALSE, 0)"))
            sealing.execute(
                text("INSERT INTO ledger_account VALUES ('user:a', 'a', 'user', 9, 0), ('node_owner:a', 'a', 'node_owner', 9, 0)")
            )
            sealing.execute(text("INSERT INTO posting VALUES ('t', 0, 'user:a', -5, 0), ('t', 1, 'node_owner:a', 5, 0)"))
            sealing.execute(text("INSERT INTO ledger_transaction VALUES ('t', 'grant', '', 0)"))
        with pytest.raises(IntegrityError, match="sum to zero"):
            late.commit()
    engine.dispose()


def test_postings_of_older_books_are_kept_and_lie_by_their_key(tmp_path):
    url = f"sqlite:///{tmp_path / 'potluck.db'}"
    lines = [("grant:ann", 0, "issuer", -5, 7), ("grant:ann", 1, "fee", 5, 7)]
    keep_books_of_version(
        url,
        "0013",
        "INSERT INTO ledger_account VALUES ('issuer', NULL, 'issuer', 0, 0), ('fee', NULL, 'fee', 0, 0)",
        *(f"INSERT INTO posting VALUES {line}" for line in reversed(lines)),
        "INSERT INTO ledger_transaction VALUES ('grant:ann', 'grant', '', 7)",
    )
    with open_books(url) as books:
        assert books.rows("SELECT * FROM posting") == lines
        assert books.rows("SELECT ledger_account_id, posted FROM ledger_account ORDER BY posted") == [("issuer", -5), ("fee", 5)]
        (plan,) = books.rows("EXPLAIN QUERY PLAN SELECT amount FROM posting WHERE transaction_id = 'grant:ann'")
        assert plan[3] == "SEARCH posting USING PRIMARY KEY (transaction_id=?)"
        with pytest.raises(IntegrityError, match="takes no more postings"):
            books.execute("INSERT INTO posting VALUES ('grant:ann', 2, 'fee', 5, 7)")
        with pytest.raises(IntegrityError, match="sum to zero"):
            books.execute("INSERT INTO ledger_transaction VALUES ('grant:bob', 'grant', '', 7)")
