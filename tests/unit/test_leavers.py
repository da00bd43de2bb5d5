"""Whom an engine may have died of although nobody waited for them any more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.gateway.leavers import LEAVERS_MAX, LEFT_SECONDS, Leavers, has_died
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.relay import Relay
from potluck_protocol.culprits import Fingerprint
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import (
    AttemptId,
    Endpoint,
    EndReason,
    EngineState,
    EngineStatus,
    FailureKind,
    Heartbeat,
    ModelId,
    NodeState,
    ReplicaId,
    StartAttempt,
)
from tests.support.request_path import request_by
from tests.unit.test_second_opinion import ANN, BOB, links_of

REPLICA, OTHER = ReplicaId("one"), ReplicaId("other")
A, B = Fingerprint(b"a"), Fingerprint(b"b")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_death_is_laid_to_those_who_left_the_engine_lately_and_to_no_death_after_it():
    clock = Clock()
    leavers = Leavers(clock)
    leavers.left(REPLICA, A)
    leavers.left(OTHER, A)
    clock.now = LEFT_SECONDS / 2
    leavers.left(REPLICA, B)
    clock.now = LEFT_SECONDS
    assert leavers.take(REPLICA) == {B}
    assert leavers.take(REPLICA) == frozenset(), "the next engine was left by nobody"
    assert leavers.take(OTHER) == frozenset(), "too long ago"


def test_whoever_comes_back_and_leaves_again_is_remembered_from_then_on():
    clock = Clock()
    leavers = Leavers(clock)
    leavers.left(REPLICA, A)
    clock.now = LEFT_SECONDS - 1
    leavers.left(REPLICA, A)
    clock.now = LEFT_SECONDS
    assert leavers.take(REPLICA) == {A}


def test_whoever_leaves_twice_is_one_and_the_last_to_make_room():
    leavers = Leavers(Clock())
    names = [Fingerprint(b"%d" % number) for number in range(LEAVERS_MAX)]
    for name in [*names, names[0], A]:
        leavers.left(REPLICA, name)
    assert leavers.take(REPLICA) == {*names, A} - {names[1]}


def test_an_engine_that_is_left_again_and_again_hides_no_old_ones_from_forgetting():
    clock = Clock()
    leavers = Leavers(clock)
    leavers.left(REPLICA, A)
    leavers.left(OTHER, A)
    clock.now = LEFT_SECONDS - 1
    leavers.left(REPLICA, B)
    clock.now = LEFT_SECONDS
    leavers.left(REPLICA, B)
    assert set(leavers._left_at) == {REPLICA}


READY = EngineStatus(REPLICA, ModelId("model"), EngineState.READY, "vllm")
CRASHED = replace(READY, state=EngineState.BACKING_OFF, failure_kind=FailureKind.CRASHED)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (READY, CRASHED, True),
        (READY, replace(CRASHED, failure_kind=FailureKind.HUNG, state=EngineState.STARTING), True),
        (READY, replace(CRASHED, failure_kind=FailureKind.KILLED), False),
        (READY, replace(CRASHED, failure_kind=FailureKind.GROUP_BROKEN), False),
        (READY, replace(CRASHED, failure_kind=None), False),
        (READY, replace(CRASHED, engine_kind="attach"), False),
        (READY, replace(READY, failure_kind=FailureKind.CRASHED), False),
        (replace(READY, state=EngineState.STARTING), CRASHED, False),
        (CRASHED, CRASHED, False),
        (None, CRASHED, False),
    ],
)
def test_an_engine_has_died_where_one_that_served_ends_as_requests_end_them(before, now, expected):
    assert has_died(before, now) is expected


def test_of_one_engine_the_last_so_many_are_remembered_and_of_engines_those_left_lately():
    clock = Clock()
    leavers = Leavers(clock)
    names = [Fingerprint(b"%d" % number) for number in range(LEAVERS_MAX + 1)]
    for name in names:
        leavers.left(REPLICA, name)
    clock.now = LEFT_SECONDS
    leavers.left(OTHER, A)
    assert set(leavers._left_at) == {OTHER}
    for name in names:
        leavers.left(REPLICA, name)
    assert leavers.take(REPLICA) == set(names[1:])


def attempt_on(session: NodeSession, name: str) -> Relay:
    """One more on the session's only replica."""
    (replica_id,) = session.engines
    relay = Relay(AttemptId(name), 100, 0.0, lambda *_: None)
    start = StartAttempt(AttemptId(name), replica_id, Endpoint.CHAT_COMPLETIONS, name.encode(), True, 100)
    session.start(start, relay, 0.0, request_by(body=name.encode()))
    return relay


@pytest.mark.parametrize("told_of", ["killer", "innocent"])
def test_one_that_was_given_up_here_is_at_its_engine_until_its_node_ends_it(told_of):
    links = links_of(ANN, BOB)
    session = links.sessions[0]
    killer, _, answered = (attempt_on(session, name) for name in ("killer", "innocent", "answered"))
    killer.fail(PotluckError(ErrorCode.NODE_LOST))
    answered.end(0, EndReason.COMPLETED, "")
    assert {start.attempt_id for start in session.present_at_death(AttemptId(told_of))} == {"killer", "innocent"}
    for name in ("killer", "innocent", "answered"):
        links.finish(session, AttemptId(name), next(iter(session.engines)))
    assert links._leavers.take(next(iter(session.engines))) == frozenset(), "the next engine has none of them"


def tell_of_death(links: Links, session: NodeSession, replica_id: ReplicaId) -> None:
    """The node says that this engine serves, and then that it crashed."""
    for status in (READY, CRASHED):
        links.beat(session, Heartbeat(0, NodeState.SERVING, (replace(status, replica_id=replica_id),), 0), 100.0)


def test_of_an_engine_that_dies_deserted_those_who_left_it_are_suspected_and_refused_for_a_while():
    links = links_of(ANN, BOB)
    anns, bobs = links.sessions
    (replica_id,) = anns.engines
    killer = request_by(body=b"killer").fingerprint(links.culprits)
    for number in range(2):
        attempt_on(anns, "killer")
        links.finish(anns, AttemptId("killer"), replica_id)
        tell_of_death(links, bobs, replica_id)
        assert links.culprits.is_suspect(killer) is (number == 1), "one node cannot tell of another's engine"
        tell_of_death(links, anns, replica_id)
        assert (links.culprits.is_suspect(killer), links.culprits.is_refused(killer)) == (number == 0, number == 1)


def test_where_somebody_stayed_a_heartbeat_leaves_it_to_the_end_to_say_who_was_there():
    links = links_of(ANN)
    (session,) = links.sessions
    (replica_id,) = session.engines
    for name in ("killer", "innocent"):
        attempt_on(session, name)
    links.finish(session, AttemptId("killer"), replica_id)
    tell_of_death(links, session, replica_id)
    killer, innocent = (request_by(body=name).fingerprint(links.culprits) for name in (b"killer", b"innocent"))
    assert not links.culprits.has_any
    links.engine_died(session, AttemptId("innocent"))
    tell_of_death(links, session, replica_id)
    assert links.culprits.is_suspect(killer)
    assert links.culprits.is_suspect(innocent)
    assert not links.culprits.is_refused(killer), "one death counts once"
