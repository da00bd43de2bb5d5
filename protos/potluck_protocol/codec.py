"""Values to messages and back.

Decides what a peer may say: an unknown word of an enum becomes `PotluckError(INVALID_REQUEST)`, never a wrong value. So does a name, a list
of engines, of cards or of attempts that is longer than one node needs, for what a node says of itself is kept and shown to everyone; the
text of a failure is cut instead. It must not know what becomes of a value. Chunks, ends, acknowledgements, cancels, leases and certificates
are read straight from the frame, and of them only an end's reason comes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import common_pb2, node_pb2
from potluck_protocol.values import (
    Accelerator,
    AttemptId,
    DesiredEngine,
    DesiredState,
    Endpoint,
    EndReason,
    EngineState,
    EngineStatus,
    GoodbyeReason,
    Heartbeat,
    Hello,
    Inventory,
    ModelFile,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
    StartAttempt,
    Usage,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from enum import StrEnum

ENDPOINT_NUMBER: Final = {
    Endpoint.CHAT_COMPLETIONS: common_pb2.ENDPOINT_CHAT_COMPLETIONS,
    Endpoint.COMPLETIONS: common_pb2.ENDPOINT_COMPLETIONS,
    Endpoint.EMBEDDINGS: common_pb2.ENDPOINT_EMBEDDINGS,
}
NODE_STATE_NUMBER: Final = {
    NodeState.SERVING: node_pb2.NODE_STATE_SERVING,
    NodeState.PAUSED: node_pb2.NODE_STATE_PAUSED,
    NodeState.DRAINING: node_pb2.NODE_STATE_DRAINING,
}
ENGINE_STATE_NUMBER: Final = {
    EngineState.FETCHING: node_pb2.ENGINE_STATE_FETCHING,
    EngineState.STARTING: node_pb2.ENGINE_STATE_STARTING,
    EngineState.READY: node_pb2.ENGINE_STATE_READY,
    EngineState.BACKING_OFF: node_pb2.ENGINE_STATE_BACKING_OFF,
    EngineState.REFUSED: node_pb2.ENGINE_STATE_REFUSED,
    EngineState.STOPPING: node_pb2.ENGINE_STATE_STOPPING,
}
END_REASON_NUMBER: Final = {
    EndReason.COMPLETED: node_pb2.END_REASON_COMPLETED,
    EndReason.CANCELLED: node_pb2.END_REASON_CANCELLED,
    EndReason.ENGINE_FAILED: node_pb2.END_REASON_ENGINE_FAILED,
    EndReason.REFUSED: node_pb2.END_REASON_REFUSED,
}
GOODBYE_NUMBER: Final = {
    GoodbyeReason.STOPPING: node_pb2.GOODBYE_REASON_STOPPING,
    GoodbyeReason.LEAVING: node_pb2.GOODBYE_REASON_LEAVING,
    GoodbyeReason.REVOKED: node_pb2.GOODBYE_REASON_REVOKED,
    GoodbyeReason.REPLACED: node_pb2.GOODBYE_REASON_REPLACED,
    GoodbyeReason.COORDINATOR_STOPPING: node_pb2.GOODBYE_REASON_COORDINATOR_STOPPING,
    GoodbyeReason.PROTOCOL_VERSION_UNSUPPORTED: node_pb2.GOODBYE_REASON_PROTOCOL_VERSION_UNSUPPORTED,
    GoodbyeReason.LEASE_ENDED: node_pb2.GOODBYE_REASON_LEASE_ENDED,
}

ENGINES_MAX: Final = 64
ACCELERATORS_MAX: Final = 64
IN_FLIGHT_MAX: Final = 2048
"""Attempts in a hello: twice what a coordinator gives one node at a time (`node_session.ATTEMPTS_PER_NODE_MAX`), for a node whose hello is
refused cannot come back."""
TEXT_CHARACTERS_MAX: Final = 256
"""Of an id, a name or a version."""
FAILURE_CHARACTERS_MAX: Final = 2000
"""Of an engine's last words, of which the end is kept."""

_Word = TypeVar("_Word", bound="StrEnum")
_Item = TypeVar("_Item")


def _word(numbers: Mapping[_Word, int], number: int, field: str) -> _Word:
    for word, known in numbers.items():
        if known == number:
            return word
    raise PotluckError(ErrorCode.INVALID_REQUEST, f"{field} has the unknown value {number}", param=field)


def _text(text: str, field: str) -> str:
    if len(text) > TEXT_CHARACTERS_MAX:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{field} has more than {TEXT_CHARACTERS_MAX} characters", param=field)
    return _printable(text)


def _printable(text: str, kept: str = "") -> str:
    """A peer's words are shown on other people's terminals: what would act there becomes a blank."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() or letter in kept else " " for letter in text)


def _items(items: Sequence[_Item], count_max: int, field: str) -> Sequence[_Item]:
    if len(items) > count_max:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{field} has more than {count_max} items", param=field)
    return items


def endpoint_from_number(number: int) -> Endpoint:
    """The endpoint of an enum number; raises PotluckError(INVALID_REQUEST) for an unknown one."""
    return _word(ENDPOINT_NUMBER, number, "endpoint")


def end_reason_from_number(number: int) -> EndReason:
    """The end reason of an enum number; raises PotluckError(INVALID_REQUEST) for an unknown one."""
    return _word(END_REASON_NUMBER, number, "reason")


def goodbye_reason_from_number(number: int) -> GoodbyeReason:
    """The goodbye reason of an enum number; raises PotluckError(INVALID_REQUEST) for an unknown one."""
    return _word(GOODBYE_NUMBER, number, "reason")


def node_state_from_number(number: int) -> NodeState:
    """The node state of an enum number; raises PotluckError(INVALID_REQUEST) for an unknown one."""
    return _word(NODE_STATE_NUMBER, number, "state")


def goodbye_message(reason: GoodbyeReason, message: str = "") -> node_pb2.Goodbye:
    return node_pb2.Goodbye(reason=GOODBYE_NUMBER[reason], message=message)


def goodbye_words(message: node_pb2.Goodbye) -> str:
    """Why, in the coordinator's words; the node's owner reads them on a terminal."""
    return _printable(message.message[:FAILURE_CHARACTERS_MAX])


def usage_message(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(
        prompt_token_count=usage.prompt_token_count,
        completion_token_count=usage.completion_token_count,
        cached_prompt_token_count=usage.cached_prompt_token_count,
    )


def usage_value(message: common_pb2.Usage) -> Usage:
    return Usage(message.prompt_token_count, message.completion_token_count, message.cached_prompt_token_count)


def inventory_message(inventory: Inventory) -> node_pb2.Inventory:
    return node_pb2.Inventory(
        operating_system=inventory.operating_system,
        cpu_count=inventory.cpu_count,
        memory_bytes=inventory.memory_bytes,
        disk_free_bytes=inventory.disk_free_bytes,
        accelerators=[
            node_pb2.Accelerator(name=card.name, uuid=card.uuid, memory_bytes=card.memory_bytes) for card in inventory.accelerators
        ],
    )


def inventory_value(message: node_pb2.Inventory) -> Inventory:
    """What a node has; raises PotluckError(INVALID_REQUEST) for more than a node can have."""
    return Inventory(
        operating_system=_text(message.operating_system, "inventory.operating_system"),
        cpu_count=message.cpu_count,
        memory_bytes=message.memory_bytes,
        disk_free_bytes=message.disk_free_bytes,
        accelerators=tuple(
            Accelerator(_text(card.name, "accelerators.name"), _text(card.uuid, "accelerators.uuid"), card.memory_bytes)
            for card in _items(message.accelerators, ACCELERATORS_MAX, "inventory.accelerators")
        ),
    )


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
    )


def engine_status_value(message: node_pb2.EngineStatus) -> EngineStatus:
    """One engine as its node reports it; raises PotluckError(INVALID_REQUEST). An overlong failure is cut."""
    return EngineStatus(
        replica_id=ReplicaId(_text(message.replica_id, "engines.replica_id")),
        model_id=ModelId(_text(message.model_id, "engines.model_id")),
        state=_word(ENGINE_STATE_NUMBER, message.state, "engines.state"),
        engine_kind=_text(message.engine_kind, "engines.engine_kind"),
        engine_version=_text(message.engine_version, "engines.engine_version"),
        slot_count=message.slot_count,
        running_count=message.running_count,
        context_length_tokens=message.context_length_tokens,
        fetched_bytes=message.fetched_bytes,
        fetch_total_bytes=message.fetch_total_bytes,
        failure=_printable(message.failure[-FAILURE_CHARACTERS_MAX:], kept="\n"),
        endpoints=tuple(endpoint_from_number(number) for number in _items(message.endpoints, len(Endpoint), "engines.endpoints")),
    )


def _engine_statuses(messages: Sequence[node_pb2.EngineStatus]) -> tuple[EngineStatus, ...]:
    return tuple(engine_status_value(status) for status in _items(messages, ENGINES_MAX, "engines"))


def desired_state_message(desired: DesiredState) -> node_pb2.DesiredState:
    return node_pb2.DesiredState(
        revision=desired.revision,
        engines=[
            node_pb2.DesiredEngine(
                replica_id=engine.replica_id,
                model=node_pb2.ModelFile(
                    model_id=engine.model.model_id,
                    source=engine.model.source,
                    file_name=engine.model.file_name,
                    sha256=engine.model.sha256,
                    size_bytes=engine.model.size_bytes,
                    source_sha256=engine.model.source_sha256,
                ),
                engine_kind=engine.engine_kind,
                slot_count=engine.slot_count,
                context_length_tokens=engine.context_length_tokens,
            )
            for engine in desired.engines
        ],
    )


def desired_state_value(message: node_pb2.DesiredState) -> DesiredState:
    return DesiredState(
        revision=message.revision,
        engines=tuple(
            DesiredEngine(
                replica_id=ReplicaId(engine.replica_id),
                model=ModelFile(
                    model_id=ModelId(engine.model.model_id),
                    source=engine.model.source,
                    file_name=engine.model.file_name,
                    sha256=engine.model.sha256,
                    size_bytes=engine.model.size_bytes,
                    source_sha256=engine.model.source_sha256,
                ),
                engine_kind=engine.engine_kind,
                slot_count=engine.slot_count,
                context_length_tokens=engine.context_length_tokens,
            )
            for engine in message.engines
        ),
    )


def hello_message(hello: Hello) -> node_pb2.Hello:
    return node_pb2.Hello(
        protocol_version=hello.protocol_version,
        node_id=hello.node_id,
        session_id=hello.session_id,
        agent_version=hello.agent_version,
        inventory=inventory_message(hello.inventory),
        in_flight=[node_pb2.InFlightAttempt(attempt_id=attempt_id) for attempt_id in hello.in_flight],
        state=NODE_STATE_NUMBER[hello.state],
        engines=[engine_status_message(status) for status in hello.engines],
    )


def hello_value(message: node_pb2.Hello) -> Hello:
    return Hello(
        protocol_version=message.protocol_version,
        node_id=NodeId(_text(message.node_id, "node_id")),
        session_id=SessionId(_text(message.session_id, "session_id")),
        agent_version=_text(message.agent_version, "agent_version"),
        inventory=inventory_value(message.inventory),
        state=node_state_from_number(message.state),
        in_flight=tuple(
            AttemptId(_text(attempt.attempt_id, "in_flight.attempt_id"))
            for attempt in _items(message.in_flight, IN_FLIGHT_MAX, "in_flight")
        ),
        engines=_engine_statuses(message.engines),
    )


def welcome_message(welcome: Welcome) -> node_pb2.Welcome:
    return node_pb2.Welcome(
        protocol_version=welcome.protocol_version,
        epoch=welcome.epoch,
        lease_ttl_ms=welcome.lease_ttl_ms,
        heartbeat_busy_ms=welcome.heartbeat_busy_ms,
        heartbeat_idle_ms=welcome.heartbeat_idle_ms,
        desired=desired_state_message(welcome.desired),
        resume_points=[
            node_pb2.ResumePoint(attempt_id=attempt_id, next_sequence=sequence) for attempt_id, sequence in welcome.resume_points.items()
        ],
    )


def welcome_value(message: node_pb2.Welcome) -> Welcome:
    return Welcome(
        protocol_version=message.protocol_version,
        epoch=message.epoch,
        lease_ttl_ms=message.lease_ttl_ms,
        heartbeat_busy_ms=message.heartbeat_busy_ms,
        heartbeat_idle_ms=message.heartbeat_idle_ms,
        desired=desired_state_value(message.desired),
        resume_points={AttemptId(point.attempt_id): point.next_sequence for point in message.resume_points},
    )


def heartbeat_message(heartbeat: Heartbeat) -> node_pb2.Heartbeat:
    return node_pb2.Heartbeat(
        progress_count=heartbeat.progress_count,
        state=NODE_STATE_NUMBER[heartbeat.state],
        engines=[engine_status_message(status) for status in heartbeat.engines],
        disk_free_bytes=heartbeat.disk_free_bytes,
    )


def heartbeat_value(message: node_pb2.Heartbeat) -> Heartbeat:
    return Heartbeat(
        progress_count=message.progress_count,
        state=node_state_from_number(message.state),
        engines=_engine_statuses(message.engines),
        disk_free_bytes=message.disk_free_bytes,
    )


def start_attempt_message(start: StartAttempt) -> node_pb2.StartAttempt:
    return node_pb2.StartAttempt(
        attempt_id=start.attempt_id,
        replica_id=start.replica_id,
        endpoint=ENDPOINT_NUMBER[start.endpoint],
        body=start.body,
        stream=start.stream,
        window_bytes=start.window_bytes,
    )


def start_attempt_value(message: node_pb2.StartAttempt) -> StartAttempt:
    return StartAttempt(
        attempt_id=AttemptId(message.attempt_id),
        replica_id=ReplicaId(message.replica_id),
        endpoint=endpoint_from_number(message.endpoint),
        body=message.body,
        stream=message.stream,
        window_bytes=message.window_bytes,
    )
