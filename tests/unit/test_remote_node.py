"""What a gateway makes of another one's view, which is a moment old, and of the attempts that it sent there since."""

from __future__ import annotations

import dataclasses

import pytest

from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.gateway.forward_outbox import ForwardOutbox
from potluck_coordinator.gateway.measures import Measures
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.gateway.remote_node import RemoteNode, Way
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, AttemptId, Endpoint, NodeId, RequestId, StartAttempt, Usage
from tests.support.replicas import replica_view

BODY = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": true}'


class Remote:
    def __init__(self) -> None:
        self.way = Way()
        self.way.outbox = ForwardOutbox()
        self.measures = Measures(lambda: 50.0)
        self.node = RemoteNode(NodeId("n"), 3, self.way, self.measures)
        self.view = replica_view("n", in_flight_count=1, committed_tokens=100.0)
        self.node.tell({self.view.replica_id: self.view})

    def send(self, name: str) -> Relay:
        attempt_id = AttemptId(name)
        request = parse_request(Endpoint.CHAT_COMPLETIONS, BODY, RequestId(name), AccountId("ann"))
        request = dataclasses.replace(request, work=Work(10.0, 30.0))
        relay = Relay(attempt_id, 65_536, 50.0, self.node.acknowledge)
        start = StartAttempt(attempt_id, self.view.replica_id, request.endpoint, request.body, request.stream, 65_536)
        self.node.start(start, relay, 50.0, request, frozenset({NodeId("tried")}))
        return relay

    def now(self):
        (view,) = self.node.replica_views()
        return view


@pytest.fixture
def remote():
    return Remote()


async def test_what_was_sent_since_the_view_is_counted_beside_it(remote):
    remote.send("a")
    remote.send("b")
    await remote.way.outbox.take()
    assert (remote.now().in_flight_count, remote.now().committed_tokens) == (3, 180.0)
    assert remote.now().prefill_backlog_tokens == 20.0
    # The next view counts the first of them itself.
    remote.way.starts_seen = 1
    remote.node.tell({remote.view.replica_id: remote.view._replace(in_flight_count=2, committed_tokens=140.0)})
    assert (remote.now().in_flight_count, remote.now().committed_tokens) == (3, 180.0)
    remote.way.starts_seen = 2
    assert remote.now().in_flight_count == 2
    assert remote.node.attempts == 2


def test_what_is_over_before_the_next_view_is_no_longer_counted(remote):
    remote.send("a")
    remote.node.finish(AttemptId("a"), remote.view.replica_id)
    remote.node.finish(AttemptId("a"), remote.view.replica_id)
    assert remote.now() == remote.view._replace(is_remote=True)
    assert not remote.way.relays


async def test_the_frame_says_what_was_read_from_the_body(remote):
    remote.send("a")
    remote.node.acknowledge(AttemptId("a"), 4)
    frame = await remote.way.outbox.take()
    (start,) = frame.starts
    assert (start.node_id, start.start.stream, start.account_id) == ("n", True, "ann")
    assert b"hello" in start.start.body
    assert (start.expected_prompt_tokens, start.expected_answer_tokens, list(start.tried_node_ids)) == (10.0, 30.0, ["tried"])
    assert not start.HasField("completion_tokens_max")
    assert [(said.attempt_id, said.next_sequence) for said in frame.acknowledgements] == [("a", 4)]


async def test_the_end_says_what_it_came_to(remote):
    remote.send("a")
    await remote.way.outbox.take()
    remote.measures.count(AttemptId("a"), Usage(7, 9), 8, was_outrun=True)
    remote.node.finish(AttemptId("a"), remote.view.replica_id)
    (finish,) = (await remote.way.outbox.take()).finishes
    assert (finish.usage.completion_token_count, finish.token_count, finish.was_outrun) == (9, 8, True)


async def test_one_that_never_left_is_only_finished(remote):
    remote.send("a")
    remote.node.finish(AttemptId("a"), remote.view.replica_id)
    frame = await remote.way.outbox.take()
    assert not frame.starts
    assert [finish.attempt_id for finish in frame.finishes] == ["a"]
    # The other gateway never counts it, so that its count still tells which of the next are in its view.
    remote.send("b")
    remote.way.starts_seen = len((await remote.way.outbox.take()).starts)
    assert remote.now().in_flight_count == remote.view.in_flight_count


def test_without_a_way_there_nothing_can_be_sent(remote):
    remote.way.outbox = None
    assert not remote.now().link_up
    with pytest.raises(PotluckError) as refused:
        remote.send("a")
    assert refused.value.code is ErrorCode.NO_CAPACITY


async def test_large_bodies_go_in_frames_of_their_own():
    outbox = ForwardOutbox()
    request = parse_request(Endpoint.CHAT_COMPLETIONS, BODY, RequestId("r"), AccountId("ann"))
    for name in ("a", "b", "c"):
        start = StartAttempt(AttemptId(name), replica_view().replica_id, Endpoint.CHAT_COMPLETIONS, b"x" * 600_000, True, 65_536)
        outbox.start(start, NodeId("n"), request, frozenset())
    frames = [await outbox.take() for _ in range(3)]
    assert [[start.start.attempt_id for start in frame.starts] for frame in frames] == [["a"], ["b"], ["c"]]
