"""Deployments with a tier, models with an origin, and the replicas that are planned.

The two tables are built anew: SQLite cannot add a column with a check to one that others point to. An entry's one engine kind becomes the
list of those that can serve it.
"""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    connection = op.get_bind()
    models = connection.execute(sa.text("SELECT model_id, entry FROM catalogue_model")).all()
    deployments = connection.execute(sa.text("SELECT model_id, replica_count FROM deployment")).all()
    op.drop_table("deployment")
    op.drop_table("catalogue_model")
    catalogue_model, deployment = _create_tables()
    # Whose an entry is, the next start says anew of all that it offers.
    op.bulk_insert(catalogue_model, [{"model_id": row.model_id, "entry": _entry(row.entry), "origin": "file"} for row in models])
    op.bulk_insert(deployment, [{"model_id": row.model_id, "replica_count": row.replica_count, "tier": "default"} for row in deployments])


def _create_tables() -> tuple[sa.Table, sa.Table]:
    catalogue_model = op.create_table(
        "catalogue_model",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("entry", sa.String(), nullable=False),
        sa.Column("origin", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("model_id"),
        sa.CheckConstraint("origin IN ('built_in', 'file', 'added')", name="catalogue_model_origin"),
    )
    deployment = op.create_table(
        "deployment",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("replica_count", sa.Integer(), nullable=True),
        sa.Column("tier", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("model_id"),
        sa.CheckConstraint("replica_count >= 0", name="deployment_replica_count"),
        sa.CheckConstraint("tier IN ('flex', 'default')", name="deployment_tier"),
        sa.ForeignKeyConstraint(["model_id"], ["catalogue_model.model_id"]),
    )
    op.create_table(
        "planned_replica",
        sa.Column("replica_id", sa.String(), nullable=False),
        sa.Column("node_id", sa.String(), nullable=False),
        sa.Column("plan", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("replica_id"),
        sa.ForeignKeyConstraint(["node_id"], ["node.node_id"]),
    )
    return catalogue_model, deployment


def _entry(text: str) -> str:
    entry: dict[str, Any] = json.loads(text)
    if "engine_kind" in entry:
        entry["engine_kinds"] = [entry.pop("engine_kind")]
    return json.dumps(entry)
