"""Bringing a database's schema to what this version of the package expects.

Decides that a database written by a newer Potluck is refused: an older one would not keep what the newer relies on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from potluck_protocol.errors import ErrorCode, PotluckError

_MIGRATIONS: Final = Path(__file__).with_name("migrations")


def migrate(connection: Connection) -> None:
    """Runs every migration that the database has not had, inside the connection's transaction.

    Raises:
        PotluckError: INTERNAL_ERROR where the database's version is unknown to this package.
    """
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise PotluckError(
            ErrorCode.INTERNAL_ERROR,
            f"The database has schema {current}, which this version of Potluck does not know: a newer one wrote it. "
            "Upgrade Potluck, or give this coordinator a data folder of its own.",
        )
    command.upgrade(config, "head")
