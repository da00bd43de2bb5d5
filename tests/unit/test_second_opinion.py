"""Whose nodes can be asked whether a request kills engines, and that to look requests up costs one hash of each."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from potluck_coordinator.desks import SessionGrant
from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway.directory_word import DirectoryWord
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.outbox import Outbox
from potluck_coordinator.gateway.quarantine import Quarantine
from potluck_coordinator.pool_snapshot import PoolSnapshot
from potluck_protocol.clock import SystemClock
from potluck_protocol.culprits import Culprits, Fingerprint
from potluck_protocol.values import (
    AccountId,
    DesiredEngine,
    DesiredState,
    Endpoint,
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
)
from tests.support.request_path import request_by

ANN, BOB = AccountId("ann"), AccountId("bob")
MODEL = ModelId("model")
FILE = ModelFile(MODEL, "path:/models", "model.gguf", "0" * 64, 10)
REQUEST = request_by(model_id=MODEL, prompt_tokens_min=400)


class CountingCulprits(Culprits):
    """The real ones; how often they hashed."""

    hashed_count = 0

    def fingerprint(self, endpoint: Endpoint, body: bytes) -> Fingerprint:
        self.hashed_count += 1
        return super().fingerprint(endpoint, body)


class ForgetfulDirectory:
    """One that has heard of nothing."""

    def __init__(self) -> None:
        self.lethal = self
        self.cleared: list[Fingerprint] = []

    async def clear(self, fingerprint: Fingerprint) -> None:
        self.cleared.append(fingerprint)


def links_of(*owners: AccountId, directory: ForgetfulDirectory | None = None) -> Links:
    """A gateway with one ready node of each of them."""
    links = Links(directory, LivenessLimits(), SystemClock(), lambda: None)
    for owner in owners:
        replica_id = ReplicaId(f"{owner}/model")
        status = EngineStatus(
            replica_id,
            MODEL,
            EngineState.READY,
            "vllm",
            slot_count=2,
            context_length_tokens=2048,
            endpoints=(Endpoint.CHAT_COMPLETIONS,),
        )
        wish = DesiredState(1, (DesiredEngine(replica_id, FILE, "vllm", 2, 2048),))
        node_id = NodeId(f"{owner}s")
        session = NodeSession(
            Hello(1, node_id, SessionId("session"), "test", Inventory(), NodeState.SERVING), SessionGrant(1, owner, wish), 100.0
        )
        session.outbox = Outbox()
        session.beat(Heartbeat(0, NodeState.SERVING, (status,), 0), 100.0)
        links._sessions[node_id] = session
    return links


def pause(session: NodeSession) -> None:
    session.state = NodeState.PAUSED


def lose_link(session: NodeSession) -> None:
    session.outbox = None


def close_link(session: NodeSession) -> None:
    assert session.outbox is not None
    session.outbox.close(GoodbyeReason.STOPPING, "")


def fall_silent(session: NodeSession) -> None:
    session.suspect = True


def leave(session: NodeSession) -> None:
    session.word = DirectoryWord(leaving=frozenset(session.engines))


def tell(session: NodeSession, **changes: object) -> None:
    session.engines = {replica_id: replace(status, **changes) for replica_id, status in session.engines.items()}


@pytest.mark.parametrize(
    "unable",
    [
        pause,
        lose_link,
        close_link,
        fall_silent,
        leave,
        lambda session: tell(session, state=EngineState.STARTING),
        lambda session: tell(session, context_length_tokens=399),
        lambda session: tell(session, endpoints=(Endpoint.EMBEDDINGS,)),
    ],
    ids=["paused", "without a link", "its link closing", "suspect", "leaving", "starting", "too short", "another endpoint"],
)
def test_who_could_not_take_the_request_is_no_second_opinion(unable):
    links = links_of(ANN, BOB)
    assert links.others_can_take(REQUEST, ANN)
    assert not links.others_can_take(REQUEST, ANN, tried=frozenset({NodeId("bobs")}))
    unable(links.session(NodeId("bobs")))
    assert not links.others_can_take(REQUEST, ANN)
    assert links.others_can_take(REQUEST, BOB)


def test_a_suspect_stays_away_from_its_first_owners_nodes_while_another_owner_can_be_asked():
    links = links_of(ANN, BOB)
    links.take_snapshot(PoolSnapshot(1, {}, {}, {}, 1, suspect_requests={REQUEST.fingerprint(links.culprits): ANN}))
    quarantine = Quarantine(links)
    assert {NodeId("anns") in shunned for shunned in quarantine.shunned(REQUEST, frozenset())} == {True}
    pause(links.session(NodeId("bobs")))
    assert quarantine.shunned(REQUEST, frozenset())[-1] == frozenset(), "then better there than nowhere"


async def test_a_suspect_that_is_answered_in_full_is_none_any_more_whatever_the_directory_has_heard():
    directory = ForgetfulDirectory()
    links = links_of(ANN, BOB, directory=directory)
    fingerprint = REQUEST.fingerprint(links.culprits)
    links.suspect_requests = {fingerprint: ANN}  # by a death that could not be told
    links.stood(fingerprint)
    await asyncio.sleep(0)
    assert directory.cleared == [fingerprint]
    assert Quarantine(links).shunned(REQUEST, frozenset())[-1] == frozenset()
    assert not links.suspect_requests


def test_a_request_is_hashed_once_however_often_it_is_looked_at():
    links = links_of(ANN)
    culprits = links.culprits = CountingCulprits(SystemClock().monotonic_seconds)
    quarantine = Quarantine(links)
    waiting = [request_by(model_id=MODEL, body=b"%d" % number) for number in range(8)]
    for request in waiting:
        quarantine.check(request)
        quarantine.shunned(request, frozenset())
    assert culprits.hashed_count == 0, "where nothing is known there is nothing to look up"
    links.refused_requests = frozenset({Fingerprint(b"another one")})
    for _ in range(5):
        for request in waiting:
            quarantine.check(request)
            quarantine.shunned(request, frozenset())
    assert culprits.hashed_count == len(waiting)
    assert len({request.fingerprint(culprits) for request in waiting}) == len(waiting)
