"""Holds with several payees: the shares of a payment whose answer several owners' nodes made together.

A hold with one payee stays the one row that it was, so nothing that is written changes. The triggers keep shares as they were opened.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_SEALED = "EXISTS (SELECT 1 FROM hold WHERE hold_id = NEW.hold_id)"
# name, event, when it is refused, why
_REFUSALS = (
    ("hold_payee_sealed", "INSERT", _SEALED, "an opened hold takes no more payees"),
    ("hold_payee_no_update", "UPDATE", "TRUE", "shares of a hold are never changed"),
    ("hold_payee_no_delete", "DELETE", "TRUE", "shares of a hold are never deleted"),
)


def upgrade() -> None:
    op.create_table(
        "hold_payee",
        sa.Column("hold_id", sa.String(), nullable=False),
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("weight", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("hold_id", "account_id"),
        sa.CheckConstraint("weight > 0", name="hold_payee_weight"),
        sa.ForeignKeyConstraint(["hold_id"], ["hold.hold_id"], deferrable=True, initially="DEFERRED"),
        sa.ForeignKeyConstraint(["account_id"], ["account.account_id"]),
    )
    for name, event, refused, reason in _REFUSALS:
        if op.get_bind().dialect.name == "sqlite":
            op.execute(f"CREATE TRIGGER {name} BEFORE {event} ON hold_payee WHEN {refused} BEGIN SELECT RAISE(ABORT, '{reason}'); END")
            continue
        goes_on = "OLD" if event == "DELETE" else "NEW"
        op.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF {refused} THEN RAISE EXCEPTION '{reason}' USING ERRCODE = 'check_violation'; END IF; RETURN {goes_on}; END $$"
        )
        op.execute(f"CREATE TRIGGER {name} BEFORE {event} ON hold_payee FOR EACH ROW EXECUTE FUNCTION {name}()")
