"""What the SDK's calls return: frozen values, free of gRPC and protobuf.

Decides the names a caller sees. It must not know how the values arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from potluck_protocol.cards import CardTelemetry
from potluck_protocol.rest import RestCause
from potluck_protocol.values import (
    AccountId,
    Endpoint,
    EngineStatus,
    Inventory,
    KeyPrefix,
    ModelId,
    NodeId,
    NodeState,
    PinnedFile,
    RequestId,
    TokenId,
    Usage,
)

Tier = Literal["default", "flex"]
"""What is promised of a deployment, in OpenAI's `service_tier` words: "flex" makes room for "default", never the other way round."""


@dataclass(frozen=True, slots=True)
class ChatResult:
    """A complete answer, to a chat or to a plain prompt."""

    text: str
    """The first choice's text."""
    finish_reason: str | None
    """The engine's word: "stop", "length", "tool_calls"."""
    usage: Usage
    charge_micro_credits: int
    model_id: ModelId
    node_id: NodeId
    request_id: RequestId
    raw: Mapping[str, Any] = field(repr=False)
    """The engine's own JSON document; of a streamed answer `{"events": [...]}`, every event as it came."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One entry of the pool's catalogue."""

    model_id: ModelId
    context_length_tokens: int
    prompt_price_micro_credits_per_token: int
    completion_price_micro_credits_per_token: int
    ready_replica_count: int
    """Replicas that could answer now."""
    created_at_unix_seconds: int
    licence: str
    endpoints: tuple[Endpoint, ...]
    offered_repository: str = ""
    """Of a model whose files are not pinned: where `potluck models add` finds them, as "hf:ORG/NAME". Nobody can be served it yet."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """The wish to have a model served."""

    model_id: ModelId
    replica_count: int | None = None
    """None: one on every node that may serve."""
    tier: Tier = "default"


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """All that the catalogue says of one model. Prices are micro-credits a token, which are credits a million tokens."""

    model_id: ModelId
    origin: str
    """ "built_in", "file" or "added"."""
    source: str
    """ "hf:ORG/NAME@COMMIT" and the like; of a model that is not pinned, the repository without a commit."""
    files: tuple[PinnedFile, ...]
    """Empty: not pinned, or served by engines that owners run themselves."""
    engine_kinds: tuple[str, ...]
    """The engines that can serve it, the preferred one first."""
    context_length_tokens: int
    slot_count: int
    prompt_price_micro_credits_per_token: int
    completion_price_micro_credits_per_token: int
    licence: str
    endpoints: tuple[Endpoint, ...]
    created_at_unix_seconds: int
    quantization: str
    architecture: Mapping[str, int | float]
    """Numbers by name, such as "layer_count"; empty where they are not known."""
    unchecked: str
    """Which facts nobody has compared with the repository, in words."""
    deployment: Deployment | None
    """None: nobody wishes it served."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far something has come that takes longer than a call; the same call again waits for more."""

    words: str


@dataclass(frozen=True, slots=True)
class DeploymentInfo:
    """A wish, and how far it is met."""

    deployment: Deployment
    ready_replica_count: int
    starting_replica_count: int
    waiting_request_count: int
    """Requests that wait for a slot of the model, and people who were refused one in the last minute."""
    shortfall: str
    """Why there are not more replicas, in words; empty where there are as many as wished."""


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """What one node has to do with a deployment, and why."""

    node_id: NodeId
    """Empty: this is not of one node, but of groups of them."""
    display_name: str
    verdict: str
    """One word, such as "serves", "offline", "no_fit" or "outscored"."""
    reason: str


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node as the pool sees it."""

    node_id: NodeId
    display_name: str
    owner_account_id: AccountId | None
    """None unless the caller owns the node or is the operator."""
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
    """0: never."""
    cards: tuple[CardTelemetry, ...]
    """As the node last told of them; none unless the caller owns the node or is the operator."""
    rest_causes: tuple[RestCause, ...]
    """Why it does not serve, as it last said; shown to the same people."""
    trusted: bool = False
    """By the operator's word: requests with `trusted_only` may run there."""


@dataclass(frozen=True, slots=True)
class Credits:
    """One person's balance, in micro-credits; a credit is 1,000,000 of them."""

    account_id: AccountId
    available_micro_credits: int
    held_micro_credits: int
    """Set aside for requests that are running."""
    earned_micro_credits: int
    """Earned by this person's nodes and not yet claimed."""


@dataclass(frozen=True, slots=True)
class KeyQuotas:
    """What one API key may use; 0: no bound. A day is one of UTC."""

    requests_per_day: int = 0
    tokens_per_day: int = 0
    concurrent_max: int = 0
    spend_micro_credits_per_day: int = 0


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One API key, without its secret."""

    key_prefix: KeyPrefix
    account_id: AccountId
    name: str
    created_at_unix_ms: int
    expires_at_unix_ms: int
    """0: never."""
    revoked: bool
    operator: bool
    quotas: KeyQuotas = KeyQuotas()


@dataclass(frozen=True, slots=True)
class JoinTokenInfo:
    """One join token, without its secret."""

    token_id: TokenId
    account_id: AccountId
    created_at_unix_ms: int
    expires_at_unix_ms: int
    used_by_node_id: NodeId | None
    revoked: bool


@dataclass(frozen=True, slots=True)
class AccountInfo:
    """One person."""

    account_id: AccountId
    name: str
    operator: bool
    created_at_unix_ms: int


@dataclass(frozen=True, slots=True)
class StatementEntry:
    """One change of a person's spending or earnings account."""

    transaction_id: str
    kind: str
    amount_micro_credits: int
    created_at_unix_ms: int
    ledger_account_kind: str
    """ "spending" or "earnings"."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What re-deriving every balance from the postings found."""

    findings: tuple[str, ...]
    """Empty when the books balance."""
    account_count: int
    transaction_count: int
    posting_count: int
    open_hold_count: int
    issued_micro_credits: int


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret that the pool shows once and does not keep."""

    identifier: str
    """The public part: a key's prefix or a token's id."""
    value: str = field(repr=False)
