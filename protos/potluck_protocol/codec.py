"""The link's words: values to messages and back.

Decides what a frame's parts may say, within `bounds`; engines and hardware have codecs of their own, `engine_codec` and `hardware_codec`.
It must not know what becomes of a value. Chunks, ends, acknowledgements, cancels, leases and certificates
are read straight from the frame, and of them only an end's reason comes here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from potluck_protocol.bounds import items, printable, text, word
from potluck_protocol.engine_codec import (
    ENDPOINT_NUMBER,
    FAILURE_CHARACTERS_MAX,
    desired_state_message,
    desired_state_value,
    endpoint_from_number,
    engine_status_message,
    engine_statuses_value,
)
from potluck_protocol.hardware_codec import (
    PEERS_MAX,
    card_telemetries_value,
    card_telemetry_message,
    inventory_message,
    inventory_value,
    line_measurement_message,
    line_measurement_value,
    peer_measurement_message,
    peer_measurement_value,
)
from potluck_protocol.rest import RestCause
from potluck_protocol.v1 import common_pb2, node_pb2
from potluck_protocol.values import (
    AttemptId,
    EndReason,
    GoodbyeReason,
    Heartbeat,
    Hello,
    NodeId,
    NodeState,
    ReplicaId,
    ResumePoint,
    SessionId,
    StartAttempt,
    Usage,
    Welcome,
)

NODE_STATE_NUMBER: Final = {
    NodeState.SERVING: node_pb2.NODE_STATE_SERVING,
    NodeState.PAUSED: node_pb2.NODE_STATE_PAUSED,
    NodeState.DRAINING: node_pb2.NODE_STATE_DRAINING,
}
END_REASON_NUMBER: Final = {
    EndReason.COMPLETED: node_pb2.END_REASON_COMPLETED,
    EndReason.CANCELLED: node_pb2.END_REASON_CANCELLED,
    EndReason.ENGINE_FAILED: node_pb2.END_REASON_ENGINE_FAILED,
    EndReason.REFUSED: node_pb2.END_REASON_REFUSED,
    EndReason.HANDED_BACK: node_pb2.END_REASON_HANDED_BACK,
}
REST_CAUSE_NUMBER: Final = {
    RestCause.FIRST_RUN: node_pb2.REST_CAUSE_FIRST_RUN,
    RestCause.OWNER: node_pb2.REST_CAUSE_OWNER,
    RestCause.HOURS: node_pb2.REST_CAUSE_HOURS,
    RestCause.IN_USE: node_pb2.REST_CAUSE_IN_USE,
    RestCause.OTHER_PROGRAM: node_pb2.REST_CAUSE_OTHER_PROGRAM,
    RestCause.HEAT: node_pb2.REST_CAUSE_HEAT,
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

LINK_ADDRESSES_MAX: Final = 64
IN_FLIGHT_MAX: Final = 2048
"""Attempts in a hello: twice what a coordinator gives one node at a time (`replica_view.ATTEMPTS_PER_NODE_MAX`), for a node whose hello is
refused cannot come back."""


def end_reason_from_number(number: int) -> EndReason:
    """The end reason of an enum number; raises PotluckError(INVALID_REQUEST) for an unknown one."""
    return word(END_REASON_NUMBER, number, "reason")


def goodbye_reason_from_number(number: int) -> GoodbyeReason:
    """The goodbye reason of an enum number; raises PotluckError(INVALID_REQUEST) for an unknown one."""
    return word(GOODBYE_NUMBER, number, "reason")


def node_state_from_number(number: int) -> NodeState:
    """The node state of an enum number; raises PotluckError(INVALID_REQUEST) for an unknown one."""
    return word(NODE_STATE_NUMBER, number, "state")


def rest_cause_numbers(causes: Iterable[RestCause]) -> list[node_pb2.RestCause.ValueType]:
    return [REST_CAUSE_NUMBER[cause] for cause in causes]


def rest_causes_from_numbers(numbers: Iterable[int]) -> tuple[RestCause, ...]:
    """Each once, in the order of the enum; numbers that are not known here are passed over."""
    said = set(numbers)
    return tuple(cause for cause, number in REST_CAUSE_NUMBER.items() if number in said)


def goodbye_message(reason: GoodbyeReason, message: str = "") -> node_pb2.Goodbye:
    return node_pb2.Goodbye(reason=GOODBYE_NUMBER[reason], message=message)


def goodbye_value(message: node_pb2.Goodbye) -> tuple[GoodbyeReason, str]:
    """The reason, and why in the coordinator's words; the node's owner reads them on a terminal."""
    return goodbye_reason_from_number(message.reason), printable(message.message[:FAILURE_CHARACTERS_MAX])


def usage_message(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(
        prompt_token_count=usage.prompt_token_count,
        completion_token_count=usage.completion_token_count,
        cached_prompt_token_count=usage.cached_prompt_token_count,
    )


def usage_value(message: common_pb2.Usage) -> Usage:
    return Usage(message.prompt_token_count, message.completion_token_count, message.cached_prompt_token_count)


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
        cards=[card_telemetry_message(card) for card in hello.cards],
        rest_causes=rest_cause_numbers(hello.rest_causes),
    )


def hello_value(message: node_pb2.Hello) -> Hello:
    return Hello(
        protocol_version=message.protocol_version,
        node_id=NodeId(text(message.node_id, "node_id")),
        session_id=SessionId(text(message.session_id, "session_id")),
        agent_version=text(message.agent_version, "agent_version"),
        inventory=inventory_value(message.inventory),
        state=node_state_from_number(message.state),
        in_flight=tuple(
            AttemptId(text(attempt.attempt_id, "in_flight.attempt_id")) for attempt in items(message.in_flight, IN_FLIGHT_MAX, "in_flight")
        ),
        engines=engine_statuses_value(message.engines),
        cards=card_telemetries_value(message.cards),
        rest_causes=rest_causes_from_numbers(message.rest_causes),
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
            node_pb2.ResumePoint(
                attempt_id=attempt_id, next_sequence=point.next_sequence, acknowledged_sequence=point.acknowledged_sequence
            )
            for attempt_id, point in welcome.resume_points.items()
        ],
        link_addresses=welcome.link_addresses,
        takes_brief_heartbeats=welcome.takes_brief_heartbeats,
    )


def welcome_value(message: node_pb2.Welcome) -> Welcome:
    return Welcome(
        protocol_version=message.protocol_version,
        epoch=message.epoch,
        lease_ttl_ms=message.lease_ttl_ms,
        heartbeat_busy_ms=message.heartbeat_busy_ms,
        heartbeat_idle_ms=message.heartbeat_idle_ms,
        desired=desired_state_value(message.desired),
        resume_points={AttemptId(point.attempt_id): _resume_point(point) for point in message.resume_points},
        link_addresses=tuple(message.link_addresses[:LINK_ADDRESSES_MAX]),
        takes_brief_heartbeats=message.takes_brief_heartbeats,
    )


def _resume_point(message: node_pb2.ResumePoint) -> ResumePoint:
    acknowledged = message.acknowledged_sequence if message.HasField("acknowledged_sequence") else message.next_sequence
    return ResumePoint(message.next_sequence, acknowledged)


def heartbeat_message(heartbeat: Heartbeat) -> node_pb2.Heartbeat:
    if heartbeat.unchanged:
        return node_pb2.Heartbeat(progress_count=heartbeat.progress_count, number=heartbeat.number, unchanged=True)
    return node_pb2.Heartbeat(
        progress_count=heartbeat.progress_count,
        state=NODE_STATE_NUMBER[heartbeat.state],
        engines=[engine_status_message(status) for status in heartbeat.engines],
        disk_free_bytes=heartbeat.disk_free_bytes,
        cards=[card_telemetry_message(card) for card in heartbeat.cards],
        peer_measurements=[peer_measurement_message(measurement) for measurement in heartbeat.peer_measurements],
        line=line_measurement_message(heartbeat.line),
        number=heartbeat.number,
        rest_causes=rest_cause_numbers(heartbeat.rest_causes),
    )


def heartbeat_value(message: node_pb2.Heartbeat) -> Heartbeat:
    return Heartbeat(
        progress_count=message.progress_count,
        state=node_state_from_number(message.state),
        engines=engine_statuses_value(message.engines),
        disk_free_bytes=message.disk_free_bytes,
        cards=card_telemetries_value(message.cards),
        peer_measurements=tuple(
            peer_measurement_value(measurement) for measurement in items(message.peer_measurements, PEERS_MAX, "peer_measurements")
        ),
        line=line_measurement_value(message),
        number=message.number,
        rest_causes=rest_causes_from_numbers(message.rest_causes),
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
