"""Shard groups: replicas over several nodes, which a coordinator that starts again finds where they were."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "shard_group",
        sa.Column("replica_id", sa.String(), nullable=False),
        sa.Column("shard_group", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("replica_id"),
    )
