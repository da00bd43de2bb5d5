"""How fast each node's replicas usually are, day by day."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "replica_pace",
        sa.Column("node_id", sa.String(), sa.ForeignKey("node.node_id"), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("day", sa.BigInteger(), nullable=False),
        sa.Column("tokens_per_second", sa.Float(), nullable=False),
        sa.CheckConstraint("tokens_per_second > 0", name="replica_pace_tokens_per_second"),
        sa.PrimaryKeyConstraint("node_id", "model_id", "day"),
    )
