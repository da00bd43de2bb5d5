"""Runs the migrations on the connection that `storage.schema` hands over."""

from alembic import context
from sqlmodel import SQLModel

from potluck_coordinator.storage import tables  # noqa: F401 - fills the metadata that `alembic revision --autogenerate` compares with

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,  # SQLite can only change a table by building it anew
)
context.run_migrations()
