"""The nouns of the contract as frozen values: ids, endpoints, engines, models, usage.

Decides what these words mean on both sides. It must not know protobuf: `potluck_protocol.codec` turns messages into these and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

NodeId = NewType("NodeId", str)
"""26 characters of base32: the hash of the node's public key."""
AccountId = NewType("AccountId", str)
ModelId = NewType("ModelId", str)
ReplicaId = NewType("ReplicaId", str)
RequestId = NewType("RequestId", str)
AttemptId = NewType("AttemptId", str)
SessionId = NewType("SessionId", str)
"""One run of one agent process."""
KeyPrefix = NewType("KeyPrefix", str)
"""The public part of an API key, by which it is listed and revoked."""
TokenId = NewType("TokenId", str)
"""The public part of a join token."""


class Endpoint(StrEnum):
    """What an engine can be asked; the value is the path under the engine's root, and the allow-list of what is ever forwarded."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"


class NodeState(StrEnum):
    """What the node says of itself."""

    SERVING = "serving"
    PAUSED = "paused"
    DRAINING = "draining"


class EngineState(StrEnum):
    """Where an engine stands between wish and service."""

    FETCHING = "fetching"
    STARTING = "starting"
    READY = "ready"
    BACKING_OFF = "backing_off"
    REFUSED = "refused"
    STOPPING = "stopping"


class EndReason(StrEnum):
    """How an attempt ended, as the node saw it."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    ENGINE_FAILED = "engine_failed"
    REFUSED = "refused"


class GoodbyeReason(StrEnum):
    """Why one side closes the link on purpose."""

    STOPPING = "stopping"
    LEAVING = "leaving"
    REVOKED = "revoked"
    REPLACED = "replaced"
    COORDINATOR_STOPPING = "coordinator_stopping"
    PROTOCOL_VERSION_UNSUPPORTED = "protocol_version_unsupported"
    LEASE_ENDED = "lease_ended"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the engine counted them."""

    prompt_token_count: int = 0
    completion_token_count: int = 0
    cached_prompt_token_count: int = 0


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One card."""

    name: str
    uuid: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a node has. 0 stands for a fact its probe could not get."""

    operating_system: str = ""
    cpu_count: int = 0
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    accelerators: tuple[Accelerator, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One pinned file: where it comes from and what it must hash to (hex sha256)."""

    model_id: ModelId
    source: str
    """ "hf:ORG/NAME@REVISION", "wheel:NAME==VERSION" or "path:/absolute/folder"."""
    file_name: str
    sha256: str
    size_bytes: int
    source_sha256: str = ""
    """For a wheel: the hash of the wheel itself."""


@dataclass(frozen=True, slots=True)
class DesiredEngine:
    """The directory's wish: this replica, on this node."""

    replica_id: ReplicaId
    model: ModelFile
    engine_kind: str
    slot_count: int
    context_length_tokens: int


@dataclass(frozen=True, slots=True)
class DesiredState:
    """Everything the directory wishes of one node; a higher revision replaces a lower one."""

    revision: int = 0
    engines: tuple[DesiredEngine, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One replica as its node reports it."""

    replica_id: ReplicaId
    model_id: ModelId
    state: EngineState
    engine_kind: str
    engine_version: str = ""
    slot_count: int = 0
    running_count: int = 0
    context_length_tokens: int = 0
    fetched_bytes: int = 0
    fetch_total_bytes: int = 0
    failure: str = ""
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Hello:
    """A node's first words on a link."""

    protocol_version: int
    node_id: NodeId
    session_id: SessionId
    agent_version: str
    inventory: Inventory
    state: NodeState
    in_flight: tuple[AttemptId, ...] = ()
    engines: tuple[EngineStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class Welcome:
    """The coordinator's answer to `Hello`: the lease and the wish."""

    protocol_version: int
    epoch: int
    lease_ttl_ms: int
    heartbeat_busy_ms: int
    heartbeat_idle_ms: int
    desired: DesiredState
    resume_points: dict[AttemptId, int]
    """The next sequence wanted of each attempt that goes on; an attempt of `Hello.in_flight` not named here is to be dropped."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A node's sign of life."""

    progress_count: int
    """Grows with every chunk the node produced. Its owner sees it in `potluck node status --json`; the coordinator, which believes what it
    relays itself, does not use it."""
    state: NodeState
    engines: tuple[EngineStatus, ...]
    disk_free_bytes: int


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """One try of a request on one replica."""

    attempt_id: AttemptId
    replica_id: ReplicaId
    endpoint: Endpoint
    body: bytes
    stream: bool
    window_bytes: int
