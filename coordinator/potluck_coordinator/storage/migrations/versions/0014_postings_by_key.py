"""On SQLite postings lie in the order of their key, and are not found through an index beside them: a payment writes three.

SQLite cannot change that of a table that is there, so all postings are copied into another. PostgreSQL has nothing of the kind.
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_TRIGGERS = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND sql LIKE '%posting%'"


def upgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        return
    triggers = op.get_bind().execute(sa.text(_TRIGGERS)).all()
    for name, _ in triggers:
        op.execute(f"DROP TRIGGER {name}")
    op.create_table(
        "posting_by_key",
        sa.Column("transaction_id", sa.String(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("ledger_account_id", sa.String(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("transaction_id", "line"),
        sa.CheckConstraint("amount <> 0", name="posting_amount"),
        sa.ForeignKeyConstraint(["transaction_id"], ["ledger_transaction.transaction_id"], deferrable=True, initially="DEFERRED"),
        sa.ForeignKeyConstraint(["ledger_account_id"], ["ledger_account.ledger_account_id"]),
        sqlite_with_rowid=False,
    )
    op.execute(
        "INSERT INTO posting_by_key SELECT transaction_id, line, ledger_account_id, amount, created_at_unix_ms FROM posting"
        " ORDER BY transaction_id, line"
    )
    op.drop_table("posting")
    op.rename_table("posting_by_key", "posting")
    op.create_index("ix_posting_ledger_account_id_created_at_unix_ms", "posting", ["ledger_account_id", "created_at_unix_ms"])
    for _, sql in triggers:
        op.execute(sql)
