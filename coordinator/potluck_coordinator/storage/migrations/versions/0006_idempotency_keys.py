"""Idempotency keys, so that a request is not run and charged again by a coordinator that starts again."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotency_key",
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("key_hash", sa.String(), nullable=False),
        sa.Column("body_hash", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("claim_id", sa.String(), nullable=False),
        sa.Column("gateway_epoch", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("charge", sa.BigInteger(), nullable=False),
        sa.Column("claimed_at_unix_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("state IN ('claimed', 'spent')", name="idempotency_key_state"),
        sa.CheckConstraint("charge >= 0", name="idempotency_key_charge"),
        sa.PrimaryKeyConstraint("account_id", "key_hash"),
        sa.ForeignKeyConstraint(["account_id"], ["account.account_id"]),
    )
    op.create_index("ix_idempotency_key_claimed_at_unix_ms", "idempotency_key", ["claimed_at_unix_ms"])
