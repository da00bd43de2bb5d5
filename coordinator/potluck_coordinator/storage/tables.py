"""The tables.

Decides columns, keys and checks; `migrations` builds the same and adds the triggers that no model can express (see its first version). It
must not know what an amount is for. Rows never leave `storage`: its repositories turn them into frozen values.

Every amount and time is BIGINT: SQLModel's own integer is 32 bits on PostgreSQL, which 2,147 credits overflow.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Index, LargeBinary, UniqueConstraint, text
from sqlmodel import Field, SQLModel

IS_OPEN: Final = text("state = 'open'")
"""Of a hold. In these words, for only a query that has them finds the index of open holds."""


def _big(*, nullable: bool = False, primary_key: bool = False) -> Any:
    return Field(sa_type=BigInteger, nullable=nullable, primary_key=primary_key)


class AccountRow(SQLModel, table=True):
    """A person."""

    __tablename__ = "account"

    account_id: str = Field(primary_key=True)
    name: str = Field(unique=True)
    operator: bool
    created_at_unix_ms: int = _big()


class ApiKeyRow(SQLModel, table=True):
    """A person's key, by its hash."""

    __tablename__ = "api_key"

    key_prefix: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="account.account_id", index=True)
    name: str
    secret_sha256: str
    created_at_unix_ms: int = _big()
    expires_at_unix_ms: int = _big()
    revoked: bool
    requests_per_day: int = _big()
    """0: no bound, as with the next three."""
    tokens_per_day: int = _big()
    concurrent_max: int = _big()
    spend_per_day: int = _big()
    """Micro-credits."""


class JoinTokenRow(SQLModel, table=True):
    """A single-use leave for one node to enrol."""

    __tablename__ = "join_token"

    token_id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="account.account_id", index=True)
    secret_sha256: str
    created_at_unix_ms: int = _big()
    expires_at_unix_ms: int = _big()
    used_by_node_id: str | None = None
    revoked: bool


class NodeRow(SQLModel, table=True):
    """An enrolled node. `inventory` is JSON of the value of that name."""

    __tablename__ = "node"
    __table_args__ = (CheckConstraint("status IN ('active', 'revoked', 'left')", name="node_status"),)

    node_id: str = Field(primary_key=True)
    owner_account_id: str = Field(foreign_key="account.account_id", index=True)
    display_name: str
    public_key_spki: bytes = Field(sa_type=LargeBinary)
    status: str
    status_reason: str
    epoch: int = _big()
    inventory: str
    agent_version: str
    enrolled_at_unix_ms: int = _big()
    last_seen_at_unix_ms: int = _big()


class TrustedNodeRow(SQLModel, table=True):
    """The operator's word that a node is trusted; taken back, the row goes."""

    __tablename__ = "trusted_node"

    node_id: str = Field(primary_key=True, foreign_key="node.node_id")
    trusted_at_unix_ms: int = _big()


class LedgerAccountRow(SQLModel, table=True):
    """An account of the ledger. Only postings move `posted`; `held` is the sum of its open holds."""

    __tablename__ = "ledger_account"
    __table_args__ = (
        CheckConstraint("kind IN ('issuer', 'user', 'node_owner', 'fee')", name="ledger_account_kind"),
        CheckConstraint("kind = 'issuer' OR posted - held >= 0", name="ledger_account_not_overdrawn"),
        CheckConstraint("held >= 0", name="ledger_account_held"),
        CheckConstraint("(kind IN ('issuer', 'fee')) = (owner_account_id IS NULL)", name="ledger_account_owner"),
    )

    ledger_account_id: str = Field(primary_key=True)
    owner_account_id: str | None = Field(default=None, foreign_key="account.account_id", index=True)
    kind: str
    posted: int = _big()
    held: int = _big()


class LedgerTransactionRow(SQLModel, table=True):
    """One booked event; written after its postings, which it seals."""

    __tablename__ = "ledger_transaction"

    transaction_id: str = Field(primary_key=True)
    kind: str
    fingerprint: str
    created_at_unix_ms: int = _big()


class PostingRow(SQLModel, table=True):
    """One line of a transaction. The deferred key lets lines come first, so that the transaction's trigger sees them all.

    The transaction's date stands here too, for an account's newest lines to be found without reading all of them.
    """

    __tablename__ = "posting"
    __table_args__ = (
        CheckConstraint("amount <> 0", name="posting_amount"),
        Index("ix_posting_ledger_account_id_created_at_unix_ms", "ledger_account_id", "created_at_unix_ms"),
        {"sqlite_with_rowid": False},
    )

    transaction_id: str = Field(
        sa_column=Column(
            ForeignKey("ledger_transaction.transaction_id", deferrable=True, initially="DEFERRED"), primary_key=True, nullable=False
        )
    )
    line: int = Field(primary_key=True)
    ledger_account_id: str = Field(foreign_key="ledger_account.ledger_account_id")
    amount: int = _big()
    created_at_unix_ms: int = _big()


class HoldRow(SQLModel, table=True):
    """Credits set aside for one attempt. Its payee earns by it alone, unless `hold_payee` names shares: of these it is the first."""

    __tablename__ = "hold"
    __table_args__ = (
        CheckConstraint("amount >= 0", name="hold_amount"),
        CheckConstraint("delivered BETWEEN 0 AND amount", name="hold_delivered"),
        CheckConstraint("settled BETWEEN 0 AND amount", name="hold_settled"),
        CheckConstraint("state IN ('open', 'settled', 'expired')", name="hold_state"),
        CheckConstraint("(state = 'open') = (closed_at_unix_ms IS NULL)", name="hold_closed_at"),
        Index("ix_hold_open", "expires_at_unix_ms", sqlite_where=IS_OPEN, postgresql_where=IS_OPEN),
    )

    hold_id: str = Field(primary_key=True)
    payer_account_id: str = Field(foreign_key="account.account_id")
    payee_account_id: str = Field(foreign_key="account.account_id")
    amount: int = _big()
    delivered: int = _big()
    settled: int = _big()
    state: str
    gateway_epoch: int = _big()
    expires_at_unix_ms: int = _big()
    opened_at_unix_ms: int = _big()
    closed_at_unix_ms: int | None = _big(nullable=True)


class HoldPayeeRow(SQLModel, table=True):
    """One of several owners' share of a hold, by weight; written before the hold, which seals its shares. A single payee has none."""

    __tablename__ = "hold_payee"
    __table_args__ = (CheckConstraint("weight > 0", name="hold_payee_weight"),)

    hold_id: str = Field(
        sa_column=Column(ForeignKey("hold.hold_id", deferrable=True, initially="DEFERRED"), primary_key=True, nullable=False)
    )
    account_id: str = Field(primary_key=True, foreign_key="account.account_id")
    weight: int = _big()


class EarningsClaimRow(SQLModel, table=True):
    """What a claim moved, so that the same claim, even one of nothing, answers the same again."""

    __tablename__ = "earnings_claim"

    account_id: str = Field(primary_key=True, foreign_key="account.account_id")
    claim_id: str = Field(primary_key=True)
    amount: int = _big()
    created_at_unix_ms: int = _big()


class CatalogueModelRow(SQLModel, table=True):
    """A model on offer. `entry` is JSON of the `CatalogueEntry`; `origin` says who offers it, and so who may take it away."""

    __tablename__ = "catalogue_model"
    __table_args__ = (CheckConstraint("origin IN ('built_in', 'file', 'added')", name="catalogue_model_origin"),)

    model_id: str = Field(primary_key=True)
    entry: str
    origin: str


class DeploymentRow(SQLModel, table=True):
    """The wish to have a model served; no count asks for one replica on every node that may serve."""

    __tablename__ = "deployment"
    __table_args__ = (
        CheckConstraint("replica_count >= 0", name="deployment_replica_count"),
        CheckConstraint("tier IN ('flex', 'default')", name="deployment_tier"),
    )

    model_id: str = Field(primary_key=True, foreign_key="catalogue_model.model_id")
    replica_count: int | None = None
    tier: str


class PlannedReplicaRow(SQLModel, table=True):
    """A replica that is wished of a node, so that a directory that starts anew disturbs none. `plan` is JSON of the `PlannedReplica`."""

    __tablename__ = "planned_replica"

    replica_id: str = Field(primary_key=True)
    node_id: str = Field(foreign_key="node.node_id")
    plan: str


class ShardGroupRow(SQLModel, table=True):
    """A replica over several nodes, in its present generation. `shard_group` is JSON of the value of that name."""

    __tablename__ = "shard_group"

    replica_id: str = Field(primary_key=True)
    shard_group: str


class LethalRequestRow(SQLModel, table=True):
    """A request with which an engine died, by its keyed hash; with a date where it is refused for good."""

    __tablename__ = "lethal_request"

    fingerprint: str = Field(primary_key=True)
    attempt_id: str
    owner_account_id: str
    died_at_unix_ms: int = _big()
    refused_at_unix_ms: int | None = _big(nullable=True)


class IdempotencyKeyRow(SQLModel, table=True):
    """A key under which a request was begun, so that it is not run again. Of key and body only keyed hashes; of the answer nothing."""

    __tablename__ = "idempotency_key"
    __table_args__ = (
        CheckConstraint("state IN ('claimed', 'spent')", name="idempotency_key_state"),
        CheckConstraint("charge >= 0", name="idempotency_key_charge"),
    )

    account_id: str = Field(primary_key=True, foreign_key="account.account_id")
    key_hash: str = Field(primary_key=True)
    body_hash: str
    request_id: str
    claim_id: str
    gateway_epoch: int = _big()
    state: str
    charge: int = _big()
    claimed_at_unix_ms: int = Field(sa_type=BigInteger, index=True)


class PromiseHourRow(SQLModel, table=True):
    """Requests of the default tier in one hour of unix time, and how many had their first token in time."""

    __tablename__ = "promise_hour"
    __table_args__ = (CheckConstraint("kept_count BETWEEN 0 AND request_count", name="promise_hour_kept_count"),)

    hour: int = _big(primary_key=True)
    request_count: int = _big()
    kept_count: int = _big()


class KeyDayRow(SQLModel, table=True):
    """What a key with quotas used on one day of unix time."""

    __tablename__ = "key_day"

    key_prefix: str = Field(primary_key=True)
    day: int = _big(primary_key=True)
    request_count: int = _big()
    token_count: float
    spend: int = _big()
    """Micro-credits."""


class NodeUptimeHourRow(SQLModel, table=True):
    """A node's judged minutes in one hour of unix time."""

    __tablename__ = "node_uptime_hour"
    __table_args__ = (
        CheckConstraint("up_minutes >= 0 AND down_minutes >= 0 AND up_minutes + down_minutes <= 60", name="node_uptime_hour_minutes"),
    )

    node_id: str = Field(primary_key=True, foreign_key="node.node_id")
    hour: int = _big(primary_key=True)
    up_minutes: int
    down_minutes: int


class ReplicaPaceRow(SQLModel, table=True):
    """How fast a replica wrote answers, on the median of one day of unix time's minutes."""

    __tablename__ = "replica_pace"
    __table_args__ = (CheckConstraint("tokens_per_second > 0", name="replica_pace_tokens_per_second"),)

    node_id: str = Field(primary_key=True, foreign_key="node.node_id")
    model_id: str = Field(primary_key=True)
    day: int = _big(primary_key=True)
    tokens_per_second: float


class GatewayRow(SQLModel, table=True):
    """Which epoch a gateway's number has now, and where that gateway is reached: empty until its ports are open."""

    __tablename__ = "gateway"
    __table_args__ = (UniqueConstraint("epoch", name="gateway_epoch"),)

    number: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    epoch: int = _big()
    peer_address: str
    link_address: str


class CoordinatorStateRow(SQLModel, table=True):
    """A named fact of the pool: its id, its counters."""

    __tablename__ = "coordinator_state"

    name: str = Field(primary_key=True)
    value: str
