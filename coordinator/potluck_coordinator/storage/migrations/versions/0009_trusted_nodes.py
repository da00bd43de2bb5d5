"""Nodes that the operator trusts; of those that there are, none is yet."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "trusted_node",
        sa.Column("node_id", sa.String(), sa.ForeignKey("node.node_id"), nullable=False),
        sa.Column("trusted_at_unix_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node_id"),
    )
