"""What a node may say of itself, and how much of it."""

from __future__ import annotations

from typing import Any

import pytest

from potluck_coordinator.gateway.node_session import ATTEMPTS_PER_NODE_MAX
from potluck_protocol import codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import (
    Accelerator,
    Endpoint,
    EngineState,
    EngineStatus,
    GoodbyeReason,
    Heartbeat,
    Hello,
    Inventory,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
)

LONGEST = "x" * codec.TEXT_CHARACTERS_MAX
TOO_LONG = LONGEST + "x"


def engine(**changes: Any) -> EngineStatus:
    fields: dict[str, Any] = {
        "replica_id": ReplicaId(LONGEST),
        "model_id": ModelId(LONGEST),
        "state": EngineState.READY,
        "engine_kind": LONGEST,
        "engine_version": LONGEST,
        "endpoints": tuple(Endpoint),
    }
    return EngineStatus(**{**fields, **changes})


def inventory(**changes: Any) -> Inventory:
    cards = (Accelerator(LONGEST, LONGEST, 1),) * codec.ACCELERATORS_MAX
    return Inventory(**{"operating_system": LONGEST, "accelerators": cards, **changes})


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "protocol_version": 1,
        "node_id": NodeId(LONGEST),
        "session_id": SessionId(LONGEST),
        "agent_version": LONGEST,
        "inventory": inventory(),
        "state": NodeState.SERVING,
        "in_flight": (LONGEST,) * codec.IN_FLIGHT_MAX,
        "engines": (engine(),) * codec.ENGINES_MAX,
    }
    return Hello(**{**fields, **changes})


def test_as_much_as_a_node_can_have_is_taken() -> None:
    assert codec.hello_value(codec.hello_message(hello())) == hello()
    heartbeat = Heartbeat(1, NodeState.SERVING, hello().engines, 2)
    assert codec.heartbeat_value(codec.heartbeat_message(heartbeat)) == heartbeat


@pytest.mark.parametrize(
    "changes",
    [
        *({name: TOO_LONG} for name in ("node_id", "session_id", "agent_version")),
        {"in_flight": (TOO_LONG,)},
        {"in_flight": ("a",) * (codec.IN_FLIGHT_MAX + 1)},
        {"engines": (engine(),) * (codec.ENGINES_MAX + 1)},
        *({"engines": (engine(**{name: TOO_LONG}),)} for name in ("replica_id", "model_id", "engine_kind", "engine_version")),
        {"engines": (engine(endpoints=(Endpoint.EMBEDDINGS,) * 4),)},
        {"inventory": inventory(operating_system=TOO_LONG)},
        {"inventory": inventory(accelerators=(Accelerator("a", "b", 1),) * (codec.ACCELERATORS_MAX + 1))},
        {"inventory": inventory(accelerators=(Accelerator(TOO_LONG, "b", 1),))},
        {"inventory": inventory(accelerators=(Accelerator("a", TOO_LONG, 1),))},
    ],
)
def test_more_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PotluckError) as refused:
        codec.hello_value(codec.hello_message(hello(**changes)))
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert refused.value.param
    assert TOO_LONG not in refused.value.message


def test_a_node_may_name_every_attempt_that_a_coordinator_gives_it() -> None:
    assert codec.IN_FLIGHT_MAX >= ATTEMPTS_PER_NODE_MAX


def test_a_heartbeat_has_the_same_bounds() -> None:
    for engines in ((engine(),) * (codec.ENGINES_MAX + 1), (engine(engine_version=TOO_LONG),)):
        with pytest.raises(PotluckError) as refused:
            codec.heartbeat_value(codec.heartbeat_message(Heartbeat(1, NodeState.SERVING, engines, 2)))
        assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_of_an_overlong_failure_the_end_is_kept() -> None:
    message = node_pb2.EngineStatus(state=node_pb2.ENGINE_STATE_BACKING_OFF, failure="begin" + "x" * 10_000 + "the end")
    failure = codec.engine_status_value(message).failure
    assert len(failure) == codec.FAILURE_CHARACTERS_MAX
    assert failure.endswith("the end")


def test_a_goodbyes_words_are_bounded_and_harmless_on_a_terminal() -> None:
    message = codec.goodbye_message(GoodbyeReason.REVOKED, "too\x1b[2J hot " + "x" * 10_000)
    words = codec.goodbye_words(message)
    assert words.startswith("too [2J hot x")
    assert len(words) == codec.FAILURE_CHARACTERS_MAX
