"""Requests with which engines died, so that those that are refused for good stay refused when the coordinator starts again."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "lethal_request",
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("attempt_id", sa.String(), nullable=False),
        sa.Column("owner_account_id", sa.String(), nullable=False),
        sa.Column("died_at_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("refused_at_unix_ms", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("fingerprint"),
    )
