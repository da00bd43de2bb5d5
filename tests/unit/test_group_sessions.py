"""What a gateway makes of a shard group: its leader is the replica, its other members are none, and a broken one ends its answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.desks import SessionGrant
from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.outbox import Outbox
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.pool_snapshot import PoolSnapshot
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import (
    AccountId,
    AttemptId,
    DesiredEngine,
    DesiredState,
    Endpoint,
    EngineState,
    EngineStatus,
    GroupPlace,
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
)
from tests.support.request_path import request_by

NODE, MODEL, GROUP = NodeId("node"), ModelId("big"), ReplicaId("group/big/0")
HELLO = Hello(1, NODE, SessionId("session"), "test", Inventory(), NodeState.SERVING)
PLACE = GroupPlace(GROUP, 3, 0, "10.0.0.1", 29600, "10.0.0.1", (5, 5))
FILE = ModelFile(MODEL, "path:/models", "big.safetensors", "0" * 64, 10)
READY = EngineStatus(GROUP, MODEL, EngineState.READY, "vllm", slot_count=2, endpoints=(Endpoint.CHAT_COMPLETIONS,), group_generation=3)


def session_of(place, *engines):
    wish = DesiredState(1, (DesiredEngine(GROUP, FILE, "vllm", 2, 2048, group=place),))
    session = NodeSession(HELLO, SessionGrant(1, AccountId("owner"), wish), 100.0)
    session.outbox = Outbox()
    session.beat(Heartbeat(0, NodeState.SERVING, engines, 0), 100.0)
    return session


@pytest.mark.parametrize(("generation", "ready"), [(3, True), (2, False), (4, False)])
def test_the_leader_is_a_replica_in_the_generation_that_is_wished(generation, ready):
    (view,) = session_of(PLACE, replace(READY, group_generation=generation)).replica_views(MODEL)
    assert (view.replica_id, view.ready) == (GROUP, ready)


def test_a_member_that_does_not_lead_is_no_replica():
    member = replace(PLACE, rank=1)
    assert list(session_of(member, replace(READY, group_rank=1, endpoints=())).replica_views(MODEL)) == []


def start(session, name, replica_id):
    relay = Relay(AttemptId(name), 1 << 16, 100.0, lambda *_: None)
    session.start(StartAttempt(AttemptId(name), replica_id, Endpoint.CHAT_COMPLETIONS, b"{}", True, 1 << 16), relay, 100.0, request_by())
    return relay


async def test_answers_of_a_broken_group_end_with_its_reason_and_others_go_on():
    session = session_of(PLACE, READY)
    links = Links(None, LivenessLimits(), SystemClock(), lambda: None)
    links._sessions[NODE] = session
    broken, whole = start(session, "a", GROUP), start(session, "b", ReplicaId("node/small"))
    links.take_snapshot(PoolSnapshot(2, {}, {}, {}, 1, broken_groups={GROUP: "member n2 is lost: is not connected"}))
    with pytest.raises(PotluckError) as raised:
        await broken.next_data()
    assert raised.value.code is ErrorCode.NODE_LOST
    assert raised.value.message == "The group of nodes that was answering broke: member n2 is lost: is not connected."
    assert not whole.over
