"""Engines as they are wished and as they are: values to messages and back.

Decides how many engines one node may name, and that of a failure's text the end is kept. It must not know what becomes of a value.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from potluck_protocol.bounds import count, items, printable, text, word
from potluck_protocol.card_facts import CardFacts, PeerAccess
from potluck_protocol.hardware_codec import set_field
from potluck_protocol.v1 import common_pb2, node_pb2
from potluck_protocol.values import (
    DesiredEngine,
    DesiredState,
    Endpoint,
    EngineShape,
    EngineState,
    EngineStatus,
    FailureKind,
    GroupPlace,
    ModelFile,
    ModelId,
    NodeId,
    Peer,
    PinnedFile,
    ReplicaId,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

ENDPOINT_NUMBER: Final = {
    Endpoint.CHAT_COMPLETIONS: common_pb2.ENDPOINT_CHAT_COMPLETIONS,
    Endpoint.COMPLETIONS: common_pb2.ENDPOINT_COMPLETIONS,
    Endpoint.EMBEDDINGS: common_pb2.ENDPOINT_EMBEDDINGS,
}
ENGINE_STATE_NUMBER: Final = {
    EngineState.FETCHING: node_pb2.ENGINE_STATE_FETCHING,
    EngineState.STARTING: node_pb2.ENGINE_STATE_STARTING,
    EngineState.READY: node_pb2.ENGINE_STATE_READY,
    EngineState.BACKING_OFF: node_pb2.ENGINE_STATE_BACKING_OFF,
    EngineState.REFUSED: node_pb2.ENGINE_STATE_REFUSED,
    EngineState.STOPPING: node_pb2.ENGINE_STATE_STOPPING,
}
FAILURE_KIND_NUMBER: Final = {
    FailureKind.OUT_OF_MEMORY: node_pb2.FAILURE_KIND_OUT_OF_MEMORY,
    FailureKind.CUDA_ERROR: node_pb2.FAILURE_KIND_CUDA_ERROR,
    FailureKind.BAD_MODEL: node_pb2.FAILURE_KIND_BAD_MODEL,
    FailureKind.UNSUPPORTED_ARCHITECTURE: node_pb2.FAILURE_KIND_UNSUPPORTED_ARCHITECTURE,
    FailureKind.UNSUPPORTED_CUDA_VERSION: node_pb2.FAILURE_KIND_UNSUPPORTED_CUDA_VERSION,
    FailureKind.PORT_TAKEN: node_pb2.FAILURE_KIND_PORT_TAKEN,
    FailureKind.KILLED: node_pb2.FAILURE_KIND_KILLED,
    FailureKind.HUNG: node_pb2.FAILURE_KIND_HUNG,
    FailureKind.CRASHED: node_pb2.FAILURE_KIND_CRASHED,
    FailureKind.NOT_STARTED: node_pb2.FAILURE_KIND_NOT_STARTED,
    FailureKind.FETCH_FAILED: node_pb2.FAILURE_KIND_FETCH_FAILED,
    FailureKind.NOT_ALLOWED: node_pb2.FAILURE_KIND_NOT_ALLOWED,
    FailureKind.GROUP_BROKEN: node_pb2.FAILURE_KIND_GROUP_BROKEN,
}
PEER_ACCESS_NUMBER: Final = {
    PeerAccess.ANY: node_pb2.PEER_ACCESS_UNSPECIFIED,
    PeerAccess.BRIDGES: node_pb2.PEER_ACCESS_BRIDGES,
    PeerAccess.NONE: node_pb2.PEER_ACCESS_NONE,
}
ENGINES_MAX: Final = 64
FAILURE_CHARACTERS_MAX: Final = 2000
"""Of an engine's last words, of which the end is kept."""


def endpoint_from_number(number: int) -> Endpoint:
    """The endpoint of an enum number; raises PotluckError(INVALID_REQUEST) for an unknown one."""
    return word(ENDPOINT_NUMBER, number, "endpoint")


def engine_status_message(status: EngineStatus) -> node_pb2.EngineStatus:
    return node_pb2.EngineStatus(
        replica_id=status.replica_id,
        model_id=status.model_id,
        state=ENGINE_STATE_NUMBER[status.state],
        engine_kind=status.engine_kind,
        engine_version=status.engine_version,
        slot_count=status.slot_count,
        running_count=status.running_count,
        context_length_tokens=status.context_length_tokens,
        fetched_bytes=status.fetched_bytes,
        fetch_total_bytes=status.fetch_total_bytes,
        failure=status.failure,
        endpoints=[ENDPOINT_NUMBER[endpoint] for endpoint in status.endpoints],
        failure_kind=_failure_kind_number(status.failure_kind),
        kv_capacity_tokens=status.kv_capacity_tokens,
        kv_used_tokens=status.kv_used_tokens,
        waiting_count=status.waiting_count,
        memory_bytes=status.memory_bytes,
        memory_utilization_percent=status.memory_utilization_percent,
        prefill_tokens_per_second=status.prefill_tokens_per_second,
        decode_tokens_per_second=status.decode_tokens_per_second,
        group_id=status.group_id,
        group_rank=status.group_rank,
        group_generation=status.group_generation,
        prefill_past_tokens=status.prefill_past_tokens,
        decode_past_tokens=status.decode_past_tokens,
        prefix_queried_tokens=status.prefix_queried_tokens,
        prefix_hit_tokens=status.prefix_hit_tokens,
        weight_bytes=status.weight_bytes,
    )


def engine_status_value(message: node_pb2.EngineStatus) -> EngineStatus:
    """One engine as its node reports it; raises PotluckError(INVALID_REQUEST). An overlong failure is cut."""
    return EngineStatus(
        replica_id=ReplicaId(text(message.replica_id, "engines.replica_id")),
        model_id=ModelId(text(message.model_id, "engines.model_id")),
        state=word(ENGINE_STATE_NUMBER, message.state, "engines.state"),
        engine_kind=text(message.engine_kind, "engines.engine_kind"),
        engine_version=text(message.engine_version, "engines.engine_version"),
        slot_count=count(message.slot_count, "engines.slot_count"),
        running_count=count(message.running_count, "engines.running_count"),
        context_length_tokens=count(message.context_length_tokens, "engines.context_length_tokens"),
        fetched_bytes=count(message.fetched_bytes, "engines.fetched_bytes"),
        fetch_total_bytes=count(message.fetch_total_bytes, "engines.fetch_total_bytes"),
        failure=printable(message.failure[-FAILURE_CHARACTERS_MAX:], kept="\n"),
        endpoints=tuple(endpoint_from_number(number) for number in items(message.endpoints, len(Endpoint), "engines.endpoints")),
        failure_kind=word(FAILURE_KIND_NUMBER, message.failure_kind, "engines.failure_kind") if message.failure_kind else None,
        kv_capacity_tokens=_count_if_set(message, "kv_capacity_tokens"),
        kv_used_tokens=_count_if_set(message, "kv_used_tokens"),
        waiting_count=_count_if_set(message, "waiting_count"),
        memory_bytes=_count_if_set(message, "memory_bytes"),
        memory_utilization_percent=count(message.memory_utilization_percent, "engines.memory_utilization_percent"),
        prefill_tokens_per_second=_rate_if_set(message, "prefill_tokens_per_second"),
        decode_tokens_per_second=_rate_if_set(message, "decode_tokens_per_second"),
        group_id=text(message.group_id, "engines.group_id"),
        group_rank=count(message.group_rank, "engines.group_rank"),
        group_generation=count(message.group_generation, "engines.group_generation"),
        prefill_past_tokens=count(message.prefill_past_tokens, "engines.prefill_past_tokens"),
        decode_past_tokens=count(message.decode_past_tokens, "engines.decode_past_tokens"),
        prefix_queried_tokens=_count_if_set(message, "prefix_queried_tokens"),
        prefix_hit_tokens=_count_if_set(message, "prefix_hit_tokens"),
        weight_bytes=_count_if_set(message, "weight_bytes"),
    )


def _count_if_set(message: node_pb2.EngineStatus, name: str) -> int | None:
    value = set_field(message, name)
    return None if value is None else count(value, f"engines.{name}")


def _rate_if_set(message: node_pb2.EngineStatus, name: str) -> float | None:
    """Not a number, endless, or less than nothing a second is no rate: the node does not know it. What is reckoned by it would go wrong."""
    value = set_field(message, name)
    return value if value is not None and 0 <= value < math.inf else None


def _failure_kind_number(kind: FailureKind | None) -> node_pb2.FailureKind.ValueType:
    return node_pb2.FAILURE_KIND_UNSPECIFIED if kind is None else FAILURE_KIND_NUMBER[kind]


def engine_statuses_value(messages: Sequence[node_pb2.EngineStatus]) -> tuple[EngineStatus, ...]:
    """All engines of one node; raises PotluckError(INVALID_REQUEST)."""
    return tuple(engine_status_value(status) for status in items(messages, ENGINES_MAX, "engines"))


def desired_state_message(desired: DesiredState) -> node_pb2.DesiredState:
    return node_pb2.DesiredState(
        revision=desired.revision,
        engines=[_desired_engine_message(engine) for engine in desired.engines],
        peers=[
            node_pb2.Peer(node_id=peer.node_id, address=peer.address, port=peer.port, secret=peer.secret, dial=peer.dial)
            for peer in desired.peers
        ],
    )


def desired_state_value(message: node_pb2.DesiredState) -> DesiredState:
    return DesiredState(
        revision=message.revision,
        engines=tuple(_desired_engine_value(engine) for engine in message.engines),
        peers=tuple(Peer(NodeId(peer.node_id), peer.address, peer.port, peer.secret, peer.dial) for peer in message.peers),
    )


def _desired_engine_message(engine: DesiredEngine) -> node_pb2.DesiredEngine:
    model = engine.model
    return node_pb2.DesiredEngine(
        replica_id=engine.replica_id,
        model=node_pb2.ModelFile(
            model_id=model.model_id,
            source=model.source,
            file_name=model.file_name,
            sha256=model.sha256,
            size_bytes=model.size_bytes,
            source_sha256=model.source_sha256,
            further_files=[
                node_pb2.PinnedFile(file_name=file.file_name, sha256=file.sha256, size_bytes=file.size_bytes)
                for file in model.further_files
            ],
        ),
        engine_kind=engine.engine_kind,
        slot_count=engine.slot_count,
        context_length_tokens=engine.context_length_tokens,
        shape=_shape_message(engine.shape),
        group=None if engine.group is None else _group_place_message(engine.group),
    )


def _desired_engine_value(message: node_pb2.DesiredEngine) -> DesiredEngine:
    model = message.model
    return DesiredEngine(
        replica_id=ReplicaId(message.replica_id),
        model=ModelFile(
            model_id=ModelId(model.model_id),
            source=model.source,
            file_name=model.file_name,
            sha256=model.sha256,
            size_bytes=model.size_bytes,
            source_sha256=model.source_sha256,
            further_files=tuple(PinnedFile(file.file_name, file.sha256, file.size_bytes) for file in model.further_files),
        ),
        engine_kind=message.engine_kind,
        slot_count=message.slot_count,
        context_length_tokens=message.context_length_tokens,
        shape=_shape_value(message.shape),
        group=_group_place_value(message.group) if message.HasField("group") else None,
    )


def _shape_message(shape: EngineShape) -> node_pb2.EngineShape:
    facts = shape.card_facts
    return node_pb2.EngineShape(
        card_uuids=shape.card_uuids,
        tensor_parallel_size=shape.tensor_parallel_size,
        quantization=shape.quantization,
        kv_cache_bytes=shape.kv_cache_bytes,
        memory_bytes=shape.memory_bytes,
        card_facts=node_pb2.CardFacts(
            memory_utilization_percent=facts.memory_utilization_percent,
            half_precision=facts.half_precision,
            without_custom_all_reduce=facts.without_custom_all_reduce,
            peer_access=PEER_ACCESS_NUMBER[facts.peer_access],
        ),
        stage_layer_counts=shape.stage_layer_counts,
    )


def _shape_value(message: node_pb2.EngineShape) -> EngineShape:
    """As it was sent: `vllm_words.shape_refusal` says what of it no node starts."""
    facts = message.card_facts
    known = {number: access for access, number in PEER_ACCESS_NUMBER.items()}
    return EngineShape(
        card_uuids=tuple(message.card_uuids),
        # Not set by coordinators that know no shapes.
        tensor_parallel_size=message.tensor_parallel_size or 1,
        quantization=message.quantization,
        kv_cache_bytes=message.kv_cache_bytes,
        memory_bytes=message.memory_bytes,
        card_facts=CardFacts(
            memory_utilization_percent=facts.memory_utilization_percent,
            half_precision=facts.half_precision,
            without_custom_all_reduce=facts.without_custom_all_reduce,
            # A newer coordinator's word: through the machine's memory it works everywhere.
            peer_access=known.get(facts.peer_access, PeerAccess.NONE),
        ),
        stage_layer_counts=tuple(message.stage_layer_counts),
    )


def _group_place_message(place: GroupPlace) -> node_pb2.GroupPlace:
    return node_pb2.GroupPlace(
        group_id=place.group_id,
        generation=place.generation,
        rank=place.rank,
        leader_address=place.leader_address,
        leader_port=place.leader_port,
        address=place.address,
        layer_counts=place.layer_counts,
    )


def _group_place_value(message: node_pb2.GroupPlace) -> GroupPlace:
    return GroupPlace(
        group_id=message.group_id,
        generation=message.generation,
        rank=message.rank,
        leader_address=message.leader_address,
        leader_port=message.leader_port,
        address=message.address,
        layer_counts=tuple(message.layer_counts),
    )
