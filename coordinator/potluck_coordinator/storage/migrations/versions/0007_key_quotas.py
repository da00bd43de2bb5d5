"""What one key may use in a day, and how the default tier's promise was kept.

The keys' table is built anew: so its columns stand as its model has them, and every key that there is has had no bound.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_QUOTAS = ("requests_per_day", "tokens_per_day", "concurrent_max", "spend_per_day")


def upgrade() -> None:
    keys = op.get_bind().execute(sa.text("SELECT * FROM api_key")).mappings().all()
    op.drop_index("ix_api_key_account_id", "api_key")
    op.drop_table("api_key")
    api_key = op.create_table(
        "api_key",
        sa.Column("key_prefix", sa.String(), nullable=False),
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("secret_sha256", sa.String(), nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _QUOTAS),
        sa.PrimaryKeyConstraint("key_prefix"),
        sa.ForeignKeyConstraint(["account_id"], ["account.account_id"]),
    )
    op.create_index("ix_api_key_account_id", "api_key", ["account_id"])
    op.bulk_insert(api_key, [{**key, "revoked": bool(key["revoked"]), **dict.fromkeys(_QUOTAS, 0)} for key in keys])
    op.create_table(
        "promise_hour",
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("request_count", sa.BigInteger(), nullable=False),
        sa.Column("kept_count", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kept_count BETWEEN 0 AND request_count", name="promise_hour_kept_count"),
        sa.PrimaryKeyConstraint("hour"),
    )
