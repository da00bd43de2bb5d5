"""The first schema: people, nodes, catalogue, and the ledger with the triggers that keep it true.

The triggers say what the models cannot: what is booked stays as it is, a transaction's postings sum to zero, an account's `posted` is the
sum of its postings, and a hold leaves `open` once.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_people()
    _create_nodes()
    _create_catalogue()
    _create_ledger()
    _create_holds()
    _create_triggers()


def _text(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.String(), nullable=nullable)


def _big(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def _flag(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Boolean(), nullable=False)


def _number(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer(), nullable=nullable)


def _create_people() -> None:
    op.create_table(
        "account",
        _text("account_id"),
        _text("name"),
        _flag("operator"),
        _big("created_at_unix_ms"),
        sa.PrimaryKeyConstraint("account_id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "api_key",
        _text("key_prefix"),
        _text("account_id"),
        _text("name"),
        _text("secret_sha256"),
        _big("created_at_unix_ms"),
        _big("expires_at_unix_ms"),
        _flag("revoked"),
        sa.PrimaryKeyConstraint("key_prefix"),
        sa.ForeignKeyConstraint(["account_id"], ["account.account_id"]),
    )
    op.create_index("ix_api_key_account_id", "api_key", ["account_id"])
    op.create_table(
        "join_token",
        _text("token_id"),
        _text("account_id"),
        _text("secret_sha256"),
        _big("created_at_unix_ms"),
        _big("expires_at_unix_ms"),
        _text("used_by_node_id", nullable=True),
        _flag("revoked"),
        sa.PrimaryKeyConstraint("token_id"),
        sa.ForeignKeyConstraint(["account_id"], ["account.account_id"]),
    )
    op.create_index("ix_join_token_account_id", "join_token", ["account_id"])


def _create_nodes() -> None:
    op.create_table(
        "node",
        _text("node_id"),
        _text("owner_account_id"),
        _text("display_name"),
        sa.Column("public_key_spki", sa.LargeBinary(), nullable=False),
        _text("status"),
        _text("status_reason"),
        _big("epoch"),
        _text("inventory"),
        _text("agent_version"),
        _big("enrolled_at_unix_ms"),
        _big("last_seen_at_unix_ms"),
        sa.PrimaryKeyConstraint("node_id"),
        sa.CheckConstraint("status IN ('active', 'revoked', 'left')", name="node_status"),
        sa.ForeignKeyConstraint(["owner_account_id"], ["account.account_id"]),
    )
    op.create_index("ix_node_owner_account_id", "node", ["owner_account_id"])
    op.create_table(
        "node_uptime_hour",
        _text("node_id"),
        _big("hour"),
        _number("up_minutes"),
        _number("down_minutes"),
        sa.PrimaryKeyConstraint("node_id", "hour"),
        sa.CheckConstraint("up_minutes >= 0 AND down_minutes >= 0 AND up_minutes + down_minutes <= 60", name="node_uptime_hour_minutes"),
        sa.ForeignKeyConstraint(["node_id"], ["node.node_id"]),
    )


def _create_catalogue() -> None:
    op.create_table("coordinator_state", _text("name"), _text("value"), sa.PrimaryKeyConstraint("name"))
    op.create_table("catalogue_model", _text("model_id"), _text("entry"), sa.PrimaryKeyConstraint("model_id"))
    op.create_table(
        "deployment",
        _text("model_id"),
        _number("replica_count", nullable=True),
        sa.PrimaryKeyConstraint("model_id"),
        sa.CheckConstraint("replica_count >= 0", name="deployment_replica_count"),
        sa.ForeignKeyConstraint(["model_id"], ["catalogue_model.model_id"]),
    )


def _create_ledger() -> None:
    op.create_table(
        "ledger_account",
        _text("ledger_account_id"),
        _text("owner_account_id", nullable=True),
        _text("kind"),
        _big("posted"),
        _big("held"),
        sa.PrimaryKeyConstraint("ledger_account_id"),
        sa.CheckConstraint("kind IN ('issuer', 'user', 'node_owner', 'fee')", name="ledger_account_kind"),
        sa.CheckConstraint("kind = 'issuer' OR posted - held >= 0", name="ledger_account_not_overdrawn"),
        sa.CheckConstraint("held >= 0", name="ledger_account_held"),
        sa.CheckConstraint("(kind IN ('issuer', 'fee')) = (owner_account_id IS NULL)", name="ledger_account_owner"),
        sa.ForeignKeyConstraint(["owner_account_id"], ["account.account_id"]),
    )
    op.create_index("ix_ledger_account_owner_account_id", "ledger_account", ["owner_account_id"])
    op.create_table(
        "ledger_transaction",
        _text("transaction_id"),
        _text("kind"),
        _text("fingerprint"),
        _big("created_at_unix_ms"),
        sa.PrimaryKeyConstraint("transaction_id"),
    )
    op.create_table(
        "posting",
        _text("transaction_id"),
        _number("line"),
        _text("ledger_account_id"),
        _big("amount"),
        _big("created_at_unix_ms"),
        sa.PrimaryKeyConstraint("transaction_id", "line"),
        sa.CheckConstraint("amount <> 0", name="posting_amount"),
        sa.ForeignKeyConstraint(["transaction_id"], ["ledger_transaction.transaction_id"], deferrable=True, initially="DEFERRED"),
        sa.ForeignKeyConstraint(["ledger_account_id"], ["ledger_account.ledger_account_id"]),
    )
    op.create_index("ix_posting_ledger_account_id_created_at_unix_ms", "posting", ["ledger_account_id", "created_at_unix_ms"])


def _create_holds() -> None:
    op.create_table(
        "hold",
        _text("hold_id"),
        _text("payer_account_id"),
        _text("payee_account_id"),
        _big("amount"),
        _big("delivered"),
        _big("settled"),
        _text("state"),
        _big("gateway_epoch"),
        _big("expires_at_unix_ms"),
        _big("opened_at_unix_ms"),
        _big("closed_at_unix_ms", nullable=True),
        sa.PrimaryKeyConstraint("hold_id"),
        sa.CheckConstraint("amount >= 0", name="hold_amount"),
        sa.CheckConstraint("delivered BETWEEN 0 AND amount", name="hold_delivered"),
        sa.CheckConstraint("settled BETWEEN 0 AND amount", name="hold_settled"),
        sa.CheckConstraint("state IN ('open', 'settled', 'expired')", name="hold_state"),
        sa.CheckConstraint("(state = 'open') = (closed_at_unix_ms IS NULL)", name="hold_closed_at"),
        sa.ForeignKeyConstraint(["payer_account_id"], ["account.account_id"]),
        sa.ForeignKeyConstraint(["payee_account_id"], ["account.account_id"]),
    )
    op.create_index("ix_hold_payer_account_id", "hold", ["payer_account_id"])
    op.create_index("ix_hold_state_expires_at_unix_ms", "hold", ["state", "expires_at_unix_ms"])
    op.create_table(
        "earnings_claim",
        _text("account_id"),
        _text("claim_id"),
        _big("amount"),
        _big("created_at_unix_ms"),
        sa.PrimaryKeyConstraint("account_id", "claim_id"),
        sa.ForeignKeyConstraint(["account_id"], ["account.account_id"]),
    )


_UNBALANCED = "(SELECT COUNT(*) < 2 OR SUM(amount) <> 0 FROM posting WHERE transaction_id = NEW.transaction_id)"
_SEALED = "EXISTS (SELECT 1 FROM ledger_transaction WHERE transaction_id = NEW.transaction_id)"
_HOLD_ALTERED = (
    "OLD.state <> 'open' OR NEW.hold_id <> OLD.hold_id OR NEW.payer_account_id <> OLD.payer_account_id"
    " OR NEW.payee_account_id <> OLD.payee_account_id OR NEW.amount <> OLD.amount OR NEW.delivered < OLD.delivered"
    " OR NEW.gateway_epoch <> OLD.gateway_epoch OR NEW.expires_at_unix_ms <> OLD.expires_at_unix_ms"
    " OR NEW.opened_at_unix_ms <> OLD.opened_at_unix_ms"
)
# name, table, event, when it is refused, why
_REFUSALS = (
    ("posting_sealed", "posting", "INSERT", _SEALED, "a booked transaction takes no more postings"),
    ("posting_no_update", "posting", "UPDATE", "TRUE", "postings are never changed"),
    ("posting_no_delete", "posting", "DELETE", "TRUE", "postings are never deleted"),
    ("ledger_transaction_balanced", "ledger_transaction", "INSERT", _UNBALANCED, "a transaction needs postings that sum to zero"),
    ("ledger_transaction_no_update", "ledger_transaction", "UPDATE", "TRUE", "transactions are never changed"),
    ("ledger_transaction_no_delete", "ledger_transaction", "DELETE", "TRUE", "transactions are never deleted"),
    ("hold_once", "hold", "UPDATE", _HOLD_ALTERED, "a hold leaves open once and keeps what it was opened with"),
    ("hold_no_delete", "hold", "DELETE", "TRUE", "holds are never deleted"),
)
_COUNT = "UPDATE ledger_account SET posted = posted + NEW.amount WHERE ledger_account_id = NEW.ledger_account_id"


def _create_triggers() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _create_triggers_sqlite()
    else:
        _create_triggers_postgresql()


def _create_triggers_sqlite() -> None:
    for name, table, event, refused, reason in _REFUSALS:
        op.execute(f"CREATE TRIGGER {name} BEFORE {event} ON {table} WHEN {refused} BEGIN SELECT RAISE(ABORT, '{reason}'); END")
    op.execute(f"CREATE TRIGGER posting_counted AFTER INSERT ON posting BEGIN {_COUNT}; END")


def _create_triggers_postgresql() -> None:
    for name, table, event, refused, reason in _REFUSALS:
        goes_on = "OLD" if event == "DELETE" else "NEW"
        op.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF {refused} THEN RAISE EXCEPTION '{reason}' USING ERRCODE = 'check_violation'; END IF; RETURN {goes_on}; END $$"
        )
        op.execute(f"CREATE TRIGGER {name} BEFORE {event} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")
    op.execute(f"CREATE FUNCTION posting_counted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {_COUNT}; RETURN NULL; END $$")
    op.execute("CREATE TRIGGER posting_counted AFTER INSERT ON posting FOR EACH ROW EXECUTE FUNCTION posting_counted()")
