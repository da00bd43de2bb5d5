"""What the gateway asks of the directory: eight desks and their values.

Decides the calls between the two. The gateway holds a `DirectoryPort`: the directory itself (`directory.directory`) where both run in one
process, as in tests, or `desk_socket.RemoteDirectory`. Every argument and answer is a frozen value, so that it may cross processes; every
refusal is a `PotluckError`. It must not know how a call crosses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from potluck_coordinator.domain.quotas import NO_QUOTAS, KeyQuotas
from potluck_coordinator.node_reports import NOBODY, Covered

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment
    from potluck_coordinator.domain.ledger import AuditReport, Balance, LedgerCommand, LedgerOutcome
    from potluck_coordinator.domain.repository import ModelWishes
    from potluck_coordinator.idempotency_desk import IdempotencyDesk
    from potluck_coordinator.node_reports import NodeReport, ReportReceipt
    from potluck_coordinator.pool_desk import LethalDesk, PoolDesk
    from potluck_protocol.cards import CardTelemetry
    from potluck_protocol.rest import RestCause
    from potluck_protocol.values import (
        AccountId,
        DesiredState,
        EngineStatus,
        GoodbyeReason,
        Hello,
        Inventory,
        KeyPrefix,
        ModelId,
        NodeId,
        NodeState,
        TokenId,
    )


@dataclass(frozen=True, slots=True)
class KeyIdentity:
    """Who an API key speaks for."""

    key_prefix: KeyPrefix
    account_id: AccountId
    operator: bool
    expires_at_unix_ms: int
    """0: never."""
    quotas: KeyQuotas = NO_QUOTAS
    earned_micro_credits: int = 0
    """What its account's nodes earned within `fairness.EARNED_DAYS`."""


@dataclass(frozen=True, slots=True)
class AccountRecord:
    """One person."""

    account_id: AccountId
    name: str
    operator: bool
    created_at_unix_ms: int


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One API key as it is listed: never its secret."""

    key_prefix: KeyPrefix
    account_id: AccountId
    name: str
    created_at_unix_ms: int
    expires_at_unix_ms: int
    revoked: bool
    operator: bool
    quotas: KeyQuotas = NO_QUOTAS


@dataclass(frozen=True, slots=True)
class JoinTokenRecord:
    """One join token as it is listed: never its secret."""

    token_id: TokenId
    account_id: AccountId
    created_at_unix_ms: int
    expires_at_unix_ms: int
    used_by_node_id: NodeId | None
    revoked: bool


@dataclass(frozen=True, slots=True)
class StatementLine:
    """One posting to one of a person's two ledger accounts: "spending" or "earnings"."""

    transaction_id: str
    kind: str
    amount_micro_credits: int
    created_at_unix_ms: int
    ledger_account_kind: str


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One enrolled node as the pool lists it."""

    node_id: NodeId
    display_name: str
    owner_account_id: AccountId
    connection: str
    """ "connected", "suspect", "offline", "revoked" or "left"."""
    state: NodeState
    engines: tuple[EngineStatus, ...]
    inventory: Inventory
    agent_version: str
    up_minutes: int
    down_minutes: int
    unknown_minutes: int
    last_seen_at_unix_ms: int
    cards: tuple[CardTelemetry, ...] = ()
    """As it last told of them; none while it is not connected."""
    rest_causes: tuple[RestCause, ...] = ()
    """Why it does not serve, as it last said."""
    trusted: bool = False


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What a node gets for its join token."""

    node_id: NodeId
    owner_account_id: AccountId
    certificate_pem: str


@dataclass(frozen=True, slots=True)
class SessionGrant:
    """Leave to serve: the lease's epoch, the owner to credit, and the wish."""

    epoch: int
    owner_account_id: AccountId
    desired: DesiredState


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One model as its operator keeps it."""

    entry: CatalogueEntry
    origin: str
    """ "built_in", "file" or "added"."""
    deployment: Deployment | None
    """None: nobody wishes it served."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far something has come that takes longer than a call; the same call again waits for more."""

    words: str


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """One wish, and how far it is met."""

    deployment: Deployment
    ready_count: int
    starting_count: int
    waiting_request_count: int
    """Requests that wait for a slot, and people who were refused one in the last minute."""
    shortfall: str
    """Why there are not more replicas, in words; empty where there are as many as wished."""


@dataclass(frozen=True, slots=True)
class NodeVerdictRecord:
    """What one node has to do with a deployment; at most one more, the last, is about groups of nodes."""

    node_id: NodeId
    """Empty in what is said of groups."""
    display_name: str
    verdict: str
    """A word of `domain.planning.explain.Verdict`; "group" in what is said of groups."""
    reason: str


class Accounts(Protocol):
    """People, their keys and join tokens."""

    async def authenticate(self, secret: str) -> KeyIdentity:
        """Whose key this is; raises INVALID_API_KEY for one that is unknown, expired or revoked."""
        ...

    async def create_account(self, name: str) -> AccountRecord: ...
    async def list_accounts(self) -> tuple[AccountRecord, ...]: ...
    async def create_key(
        self, account_id: AccountId, name: str, lifetime_seconds: int, *, ends_by_unix_ms: int = 0, quotas: KeyQuotas = NO_QUOTAS
    ) -> tuple[KeyRecord, str]:
        """The record and the secret, which is not kept; 0 seconds means no end. Refused if it would last beyond `ends_by_unix_ms`."""
        ...

    async def set_key_quotas(self, key_prefix: KeyPrefix, account_id: AccountId | None, changes: Mapping[str, int]) -> KeyRecord:
        """Changes some of a key's bounds, by the names of `KeyQuotas`; account_id as with `revoke_key`."""
        ...

    async def list_keys(self, account_id: AccountId) -> tuple[KeyRecord, ...]: ...
    async def revoke_key(self, key_prefix: KeyPrefix, account_id: AccountId | None) -> None:
        """Revokes it for good; account_id None is the operator's word, any other must own the key (else NOT_FOUND)."""
        ...

    async def create_join_token(self, account_id: AccountId, lifetime_seconds: int) -> tuple[JoinTokenRecord, str]: ...
    async def list_join_tokens(self, account_id: AccountId) -> tuple[JoinTokenRecord, ...]: ...
    async def revoke_join_token(self, token_id: TokenId, account_id: AccountId | None) -> None: ...


class Ledger(Protocol):
    """Money."""

    async def apply(self, commands: Sequence[LedgerCommand]) -> tuple[LedgerOutcome, ...]:
        """Applies the commands in order in one commit; one refusal does not touch the others."""
        ...

    async def balance(self, account_id: AccountId) -> Balance: ...
    async def statement(self, account_id: AccountId, limit: int) -> tuple[StatementLine, ...]: ...
    async def claim_earnings(self, account_id: AccountId, claim_id: str) -> int:
        """Moves everything earned to the spending account; the micro-credits moved, the same again for the same claim_id."""
        ...

    async def audit(self) -> AuditReport | Progress:
        """Derives every balance anew, beside everything else: after a second how far it has come, and the same call waits for more."""
        ...


class EnrolmentDesk(Protocol):
    """How a node becomes one of the pool's, and stays one."""

    async def join(
        self, certificate_request_der: bytes, token_id: TokenId, token_secret: str, display_name: str, inventory: Inventory
    ) -> Enrolment:
        """Spends the token; raises INVALID_INVITE. The same key with the same token again gets the same node."""
        ...

    async def is_enrolled(self, node_id: NodeId) -> bool:
        """Whether it is one of the pool's now: not for one that is revoked, left or unknown."""
        ...

    async def renew(self, certificate_request_der: bytes) -> tuple[NodeId, str]:
        """A fresh certificate, PEM, for the enrolled key that signed the request; raises INVALID_CERTIFICATE for any other."""
        ...


class NodeDesk(Protocol):
    """Which nodes there are, how they do, and what they should run."""

    async def list_nodes(self) -> tuple[NodeRecord, ...]: ...
    async def revoke_node(self, node_id: NodeId, reason: str) -> None: ...
    async def set_node_trust(self, node_id: NodeId, *, trusted: bool) -> None: ...
    async def open_session(self, hello: Hello, *, gateway_epoch: int) -> SessionGrant:
        """A new epoch for an active node that dialled that gateway; raises INVALID_CERTIFICATE for a revoked, left or unknown one."""
        ...

    async def close_session(self, node_id: NodeId, epoch: int, reason: GoodbyeReason | None) -> None:
        """The session has ended: by that goodbye, be it the coordinator's own, or (None) by silence, a lost link, or a newer agent."""
        ...

    async def report(
        self, reports: Sequence[NodeReport], waiting_counts: Mapping[ModelId, int], covered: Covered = NOBODY, *, gateway_epoch: int
    ) -> ReportReceipt:
        """A gateway's nodes, and how many requests wait there for a slot of which model, or people were refused one in the last minute.

        Args:
            reports: of nodes of which there is news, or which are at work.
            waiting_counts: by model.
            covered: the others, of which each is named several times within a lease.
            gateway_epoch: whose word it is. Raises ALREADY_EXISTS for a gateway whose number another process has by now.
        """
        ...


class CatalogueDesk(Protocol):
    """The operator's models, and the wishes to have them served. Unknown models raise MODEL_NOT_FOUND."""

    async def add_models(self, catalogue_toml: str) -> tuple[ModelRecord, ...]:
        """Puts the entries of a catalogue file's text into the catalogue, in place of those of the same names; INVALID_REQUEST."""
        ...

    async def pin_model(self, source: str, wishes: ModelWishes) -> ModelRecord | Progress:
        """Puts a repository of the hub into the catalogue, its files pinned. Called again while it answers with progress."""
        ...

    async def remove_model(self, model_id: ModelId) -> None:
        """Takes away what was added; INVALID_REQUEST for an entry of a file."""
        ...

    async def get_model(self, model_id: ModelId) -> ModelRecord: ...
    async def deploy(self, deployment: Deployment) -> None: ...
    async def undeploy(self, model_id: ModelId) -> None:
        """Takes the wish back; nothing is wrong where there is none, for the call may be made again."""
        ...

    async def list_deployments(self) -> tuple[DeploymentRecord, ...]: ...
    async def explain(self, model_id: ModelId) -> tuple[NodeVerdictRecord, ...]:
        """Every node's part in the deployment, those that serve it first; last what became of groups of nodes, where any was thought of."""
        ...


class DirectoryPort(Protocol):
    """The directory's desks."""

    @property
    def accounts(self) -> Accounts: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def enrolment(self) -> EnrolmentDesk: ...
    @property
    def nodes(self) -> NodeDesk: ...
    @property
    def catalogue(self) -> CatalogueDesk: ...
    @property
    def lethal(self) -> LethalDesk: ...
    @property
    def idempotency(self) -> IdempotencyDesk: ...
    @property
    def pool(self) -> PoolDesk: ...
