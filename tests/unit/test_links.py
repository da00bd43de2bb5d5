"""Sessions by the clock, and at their beginning: a gateway that stood still blames nobody for it, and who is out stays out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.desks import SessionGrant
from potluck_coordinator.domain.gateways import GatewayRecord
from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway.judging import LOOK_SECONDS
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.outbox import Outbox
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.gateway.reporting import report_of
from potluck_coordinator.pool_snapshot import PoolSnapshot
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import (
    AccountId,
    AttemptId,
    DesiredEngine,
    DesiredState,
    Endpoint,
    EndReason,
    EngineState,
    EngineStatus,
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

NODE = NodeId("node")


HELLO = Hello(1, NODE, SessionId("session"), "test", Inventory(), NodeState.SERVING)


class HandClock:
    def __init__(self):
        self.seconds = 100.0

    def monotonic_seconds(self):
        return self.seconds

    def unix_ms(self):
        return int(self.seconds * 1000)


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def links(clock):
    links = Links(None, LivenessLimits(), clock, lambda: None)
    links._sessions[NODE] = NodeSession(HELLO, SessionGrant(1, AccountId("owner"), DesiredState()), clock.seconds)
    return links


def test_time_in_which_the_gateway_stood_still_is_nobodys_silence(links, clock):
    clock.seconds += 60
    links.tick()
    (session,) = links.sessions
    assert session.heartbeat_at == clock.seconds


def test_a_link_lost_before_the_pause_keeps_its_grace(links, clock):
    (session,) = links.sessions
    session.link_lost_at = clock.seconds
    clock.seconds += 60
    links.tick()
    assert links.sessions == (session,)
    assert clock.seconds - session.link_lost_at <= LOOK_SECONDS


def test_a_heartbeat_read_after_the_pause_and_before_the_tick_prolongs_no_lease_into_the_future(links, clock):
    (session,) = links.sessions
    clock.seconds += 60
    session.heartbeat_at = clock.seconds
    links.tick()
    assert session.heartbeat_at == clock.seconds


def started(session, attempt_id, now):
    relay = Relay(AttemptId(attempt_id), 100, now, lambda *_: None)
    session.start(StartAttempt(relay.attempt_id, ReplicaId("r"), Endpoint.COMPLETIONS, b"", True, 100), relay, now, request_by())
    return relay


async def test_a_node_that_has_ended_its_attempts_may_be_as_silent_as_an_idle_one_however_long_they_stay_here(links, clock):
    (session,) = links.sessions
    session.outbox = Outbox()
    ended = [started(session, name, clock.seconds) for name in ("a", "b")]
    clock.seconds += 1.5
    session.beat(Heartbeat(1, NodeState.SERVING, (), 0), clock.seconds)
    for relay in ended:
        relay.end(0, EndReason.COMPLETED, "")
    # A client that reads slowly keeps them here, or a directory that is away. The next beat is due 5 s after the last one.
    for _ in range(3):
        clock.seconds += 1.5
        links.tick()
    assert not session.suspect
    # From here on it owes one every second again.
    started(session, "c", clock.seconds)
    for seconds, is_suspect in ((2.4, False), (0.2, True)):
        for _ in range(2):
            clock.seconds += seconds / 2
            links.tick()
        assert session.suspect is is_suspect


async def test_a_node_stays_suspect_after_its_silent_attempts_are_given_up(links, clock):
    (session,) = links.sessions
    session.outbox = Outbox()
    relay = started(session, "a", clock.seconds)
    for _ in range(36):
        clock.seconds += 0.25
        links.tick()
    assert relay.over
    session.finish(AttemptId("a"), ReplicaId("r"))
    links.tick()
    assert session.suspect
    session.beat(Heartbeat(1, NodeState.SERVING, (), 0), clock.seconds)
    clock.seconds += 4
    links.tick()
    assert not session.suspect


class SlowDirectory:
    """A directory, and its node desk, that grants a session while something else happens."""

    def __init__(self, meanwhile):
        self.nodes = self
        self._meanwhile = meanwhile

    async def open_session(self, hello, *, gateway_epoch):
        self._meanwhile()
        return SessionGrant(1, AccountId("owner"), DesiredState())

    async def close_session(self, node_id, epoch, reason):
        pass


async def test_a_wish_that_comes_while_a_session_is_opened_reaches_the_node(clock):
    wish = DesiredState(revision=7)
    snapshot = PoolSnapshot(1, {}, {NODE: wish}, {}, 1)
    links = Links(SlowDirectory(lambda: links.take_snapshot(snapshot)), LivenessLimits(), clock, lambda: None)
    _, _, welcome = await links.connect(HELLO)
    assert welcome.desired is wish


def test_the_directory_hears_of_cards_from_the_hello_on():
    cards = (CardTelemetry("gpu", memory_foreign_bytes=5),)
    session = NodeSession(replace(HELLO, cards=cards), SessionGrant(1, AccountId("owner"), DesiredState()), 100.0)
    assert report_of(session, 101.0).cards == cards
    session.connect(replace(HELLO, cards=()), Outbox(), 102.0)
    assert report_of(session, 103.0).cards == cards, "it has not looked yet"
    session.connect(replace(HELLO, cards=(CardTelemetry("gpu", lost=True),)), Outbox(), 104.0)
    assert report_of(session, 105.0).cards == (CardTelemetry("gpu", lost=True),)


@pytest.mark.parametrize(("engine_kind", "slot_counts"), [("attach", [4, 1, 4]), ("vllm", [4, 4, 4])])
def test_only_an_engine_that_its_owner_uses_too_is_spared_while_requests_wait_inside_it(engine_kind, slot_counts):
    wish = DesiredEngine(ReplicaId("r"), ModelFile(ModelId("m"), "attach:m", "", "", 0), engine_kind, 4, 2048)
    session = NodeSession(HELLO, SessionGrant(1, AccountId("owner"), DesiredState(1, (wish,))), 100.0)
    seen = []
    for waiting_count in (0, 3, None):
        status = EngineStatus(ReplicaId("r"), ModelId("m"), EngineState.READY, engine_kind, slot_count=4, waiting_count=waiting_count)
        session.beat(Heartbeat(0, NodeState.SERVING, (status,), 0), 101.0)
        seen += [view.slot_count for view in session.replica_views(ModelId("m"))]
    assert seen == slot_counts


async def test_a_revoked_node_is_told_why():
    session = NodeSession(HELLO, SessionGrant(1, AccountId("owner"), DesiredState()), 100.0)
    links = Links(SlowDirectory(None), LivenessLimits(), HandClock(), lambda: None)
    links._sessions[NODE] = session
    outbox = session.outbox = Outbox()
    links.take_snapshot(PoolSnapshot(1, {}, {}, {NODE: "too many wrong answers"}, 1))
    goodbye = (await outbox.take()).goodbye
    assert (goodbye.reason, goodbye.message) == (node_pb2.GOODBYE_REASON_REVOKED, "too many wrong answers")
    await links.stop()


async def test_a_node_is_told_where_the_gateways_are_when_that_changes_and_when_it_does_not_nothing(clock):
    links = Links(SlowDirectory(None), LivenessLimits(), clock, lambda: None)
    links.registered(8, b"")
    session = links._sessions[NODE] = NodeSession(HELLO, SessionGrant(1, AccountId("owner"), DesiredState()), 100.0)
    outbox = session.outbox = Outbox()
    own, other = GatewayRecord(0, 8, "a:1", "a:8603"), GatewayRecord(1, 9, "b:1", "b:8604")
    both = PoolSnapshot(1, {}, {}, {}, 1, gateways={8: own, 9: other})
    links.take_snapshot(replace(both, gateways={8: own}))
    links.take_snapshot(both)
    links.take_snapshot(replace(both, version=2))
    assert list((await outbox.take()).link_addresses) == ["a:8603", "b:8604"], "not once for each snapshot"
    links.take_snapshot(replace(both, version=3, gateways={8: own, 10: replace(other, epoch=10)}))
    outbox.ask_for_beat()
    assert list((await outbox.take()).link_addresses) == [], "another process in its place, and the same way there"
    await links.stop()


async def test_a_node_revoked_while_its_session_is_opened_does_not_get_in(clock):
    snapshot = PoolSnapshot(1, {}, {}, {NODE: ""}, 1)
    links = Links(SlowDirectory(lambda: links.take_snapshot(snapshot)), LivenessLimits(), clock, lambda: None)
    with pytest.raises(PotluckError) as refused:
        await links.connect(HELLO)
    assert refused.value.code is ErrorCode.INVALID_CERTIFICATE
    assert links.session(NODE) is None
    assert links.sessions == ()


class ReplacedGatewaysDirectory(SlowDirectory):
    async def open_session(self, hello, *, gateway_epoch):
        raise PotluckError(ErrorCode.ALREADY_EXISTS, f"The gateway of epoch {gateway_epoch} was replaced.")


async def test_an_agent_at_a_replaced_gateway_is_told_to_come_again_and_not_that_its_own_place_is_taken(clock):
    links = Links(ReplacedGatewaysDirectory(lambda: None), LivenessLimits(), clock, lambda: None)
    with pytest.raises(PotluckError) as refused:
        await links.connect(HELLO)
    assert refused.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
