"""The ledger's triggers on PostgreSQL look at all rows of a statement together, and see what only many sessions and TRUNCATE can do.

SQLite, which has neither, keeps its own: there a row at a time costs no more.
"""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

# Of the transactions that were added, or got more postings.
_UNBALANCED = "(SELECT COUNT(*) < 2 OR SUM(amount) <> 0 FROM posting p WHERE p.transaction_id = {id})"
_REFUSE_UNBALANCED = "RAISE EXCEPTION 'a transaction needs postings that sum to zero' USING ERRCODE = 'check_violation'"
_ADD_POSTINGS = """CREATE FUNCTION postings_added() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
IF EXISTS (SELECT 1 FROM added JOIN ledger_transaction USING (transaction_id)) THEN
RAISE EXCEPTION 'a booked transaction takes no more postings' USING ERRCODE = 'check_violation'; END IF;
UPDATE ledger_account a SET posted = posted + s.total
FROM (SELECT ledger_account_id, SUM(amount)::bigint AS total FROM added GROUP BY ledger_account_id) s
WHERE a.ledger_account_id = s.ledger_account_id AND s.total <> 0;
RETURN NULL; END $$"""
_FUNCTION = "CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {refused} THEN {refuse}; END IF; RETURN NULL; END $$"
_SEAL = _FUNCTION.format(
    name="ledger_transactions_added",
    refused=f"EXISTS (SELECT 1 FROM added t WHERE {_UNBALANCED.format(id='t.transaction_id')})",  # noqa: S608 - our own names
    refuse=_REFUSE_UNBALANCED,
)
# Two sessions do not see each other's rows before they commit: one may add to what the other seals. Whoever commits last sees both.
_STILL_BALANCED = _FUNCTION.format(name="posting_balanced", refused=_UNBALANCED.format(id="NEW.transaction_id"), refuse=_REFUSE_UNBALANCED)
_BY_ROW = (
    ("posting_sealed", "posting"),
    ("posting_counted", "posting"),
    ("ledger_transaction_balanced", "ledger_transaction"),
)
_ADDED = "AFTER INSERT ON {table} REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION {name}()"


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        return
    for name, table in _BY_ROW:
        op.execute(f"DROP TRIGGER {name} ON {table}")
        op.execute(f"DROP FUNCTION {name}()")
    for statement in (_ADD_POSTINGS, _SEAL, _STILL_BALANCED):
        op.execute(statement)
    for name, table in (("postings_added", "posting"), ("ledger_transactions_added", "ledger_transaction")):
        op.execute(f"CREATE TRIGGER {name} {_ADDED.format(table=table, name=name)}")
    op.execute(
        "CREATE CONSTRAINT TRIGGER posting_balanced AFTER INSERT ON posting DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION posting_balanced()"
    )
    op.execute(
        "CREATE FUNCTION books_not_emptied() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'the books are never emptied' USING ERRCODE = 'check_violation'; END $$"
    )
    for table in ("posting", "ledger_transaction", "hold", "hold_payee"):
        op.execute(f"CREATE TRIGGER {table}_not_emptied BEFORE TRUNCATE ON {table} EXECUTE FUNCTION books_not_emptied()")
