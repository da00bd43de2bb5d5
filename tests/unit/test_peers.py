"""What a gateway makes of the others' words: of thousands of nodes it looks only at those of which something is new."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from potluck_coordinator.gateway.forward_outbox import ForwardOutbox
from potluck_coordinator.gateway.measures import Measures
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_coordinator.gateway.peers import Peers, _Peer
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.gateway.remote_node import RemoteNode
from potluck_coordinator.pool_view import PoolView, SharedReplica, gateway_view
from potluck_protocol.values import AccountId, AttemptId, Endpoint, NodeId, ReplicaId, RequestId, StartAttempt
from tests.support.replicas import replica_view

HERE, THERE = 1, 2
BODY = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}'


class Links:
    """The nodes, as far as other gateways' are concerned."""

    def __init__(self) -> None:
        self.measures = Measures(self.monotonic_seconds)
        self.remote: dict[NodeId, object] = {}
        self.changed: list[str] = []
        self.own: dict[str, SimpleNamespace] = {}
        self.session = self.own.get
        self.closed: list[str] = []
        self.node_changed = self.changed.append

    def close(self, session, *_: object) -> None:
        self.closed.append(session.node_id)

    def monotonic_seconds(self) -> float:
        return 50.0


class Heard:
    """This gateway, and one other that says something of its nodes."""

    def __init__(self) -> None:
        self.links = Links()
        self.peers = Peers(HERE, None, self.links, self.links, lambda: None)
        self.peer = self.peers._peers[THERE] = _Peer("there:1")
        self.peer.way.outbox = ForwardOutbox()
        self.version = 0

    def hear(self, said: dict[str, SharedReplica], starts_seen: int = 0) -> list[str]:
        """Whom it looks at then."""
        self.version += 1
        self.links.changed.clear()
        self.peers.take(PoolView(self.version, {THERE: gateway_view(said.values(), {HERE: starts_seen}, 10.0)}))
        return sorted(self.links.changed)

    def in_flight(self, name: str) -> int:
        (view,) = self.links.remote[NodeId(name)].replica_views()
        assert view.is_remote
        return view.in_flight_count

    def send(self, name: str) -> None:
        request = parse_request(Endpoint.CHAT_COMPLETIONS, BODY, RequestId("r"), AccountId("ann"))
        attempt_id, replica_id = AttemptId(f"to {name}"), replica_view(name).replica_id
        node = self.links.remote[NodeId(name)]
        relay = Relay(attempt_id, 65_536, 50.0, node.acknowledge)
        node.start(StartAttempt(attempt_id, replica_id, request.endpoint, request.body, False, 65_536), relay, 50.0, request)


@pytest.fixture
def heard():
    return Heard()


def nodes(count: int) -> dict[str, SharedReplica]:
    return {f"n{number}": SharedReplica(replica_view(f"n{number}", slot_count=4), 1) for number in range(count)}


def with_more(said: SharedReplica, **changes: object) -> SharedReplica:
    return SharedReplica(said.view._replace(**changes), said.epoch)


def test_a_node_of_which_something_is_new_is_looked_at_and_no_other(heard, monkeypatch):
    looked_at, tell = [], RemoteNode.tell
    monkeypatch.setattr(RemoteNode, "tell", lambda node, replicas: (looked_at.append(node.node_id), tell(node, replicas)))
    said = nodes(50)
    assert heard.hear(said) == sorted(said)
    assert heard.hear(said) == []
    looked_at.clear()
    said["n7"] = with_more(said["n7"], in_flight_count=3)
    assert heard.hear(said) == looked_at == ["n7"]
    assert (heard.in_flight("n7"), heard.in_flight("n8")) == (3, 0)


async def test_what_was_sent_to_a_node_is_counted_until_it_is_in_the_view_whatever_else_that_says(heard):
    said = nodes(3)
    heard.hear(said)
    heard.send("n1")
    assert heard.in_flight("n1") == 1
    assert heard.hear(said, starts_seen=1) == ["n1"]
    assert heard.in_flight("n1") == 1, "it has not left, so that nobody can have seen it"
    await heard.peer.way.outbox.take()
    assert heard.hear(said) == ["n1"]
    assert heard.in_flight("n1") == 1
    # It came, and is over: the row is what it was.
    assert heard.hear(said, starts_seen=1) == ["n1"]
    assert heard.in_flight("n1") == 0


async def test_one_that_was_given_up_before_it_left_is_not_counted_among_those_that_did(heard):
    said = nodes(3)
    heard.hear(said)
    heard.send("n1")
    heard.send("n2")
    heard.links.remote[NodeId("n1")].finish(AttemptId("to n1"), replica_view("n1").replica_id)
    frame = await heard.peer.way.outbox.take()
    assert [start.start.attempt_id for start in frame.starts] == ["to n2"]
    heard.hear(said, starts_seen=1)
    assert (heard.in_flight("n1"), heard.in_flight("n2")) == (0, 0)


def test_that_a_node_was_full_is_taken_back_by_the_next_view_though_nothing_has_changed(heard):
    said = nodes(3)
    heard.hear(said)
    heard.send("n1")
    node = heard.links.remote[NodeId("n1")]
    node.refused(AttemptId("to n1"))
    node.finish(AttemptId("to n1"), replica_view("n1").replica_id)
    assert heard.in_flight("n1") == 4
    assert heard.hear(said) == ["n1"]
    assert heard.in_flight("n1") == 0
    assert heard.hear(said) == []


@pytest.mark.parametrize(("epoch", "closed"), [(0, ["n1"]), (1, []), (2, [])])
def test_a_node_that_another_gateway_has_by_a_later_session_is_this_ones_no_more(heard, epoch, closed):
    heard.links.own["n1"] = SimpleNamespace(node_id="n1", epoch=epoch)
    heard.hear(nodes(3))
    assert heard.links.closed == closed


def test_nodes_come_go_and_begin_anew(heard):
    said = nodes(3)
    heard.hear(said)
    first = dict(heard.links.remote)
    said["n1"] = said["n1"]._replace(epoch=2)
    assert heard.hear(said) == ["n1"]
    assert heard.links.remote[NodeId("n1")] is not first[NodeId("n1")]
    assert heard.links.remote[NodeId("n0")] is first[NodeId("n0")]
    del said["n0"]
    said["n9"] = nodes(10)["n9"]
    assert set(heard.hear(said)) == {"n0", "n1", "n2", "n9"}
    assert heard.links.remote.keys() == {"n1", "n2", "n9"}


def test_of_a_node_with_two_replicas_both_stay_when_one_changes(heard):
    said = nodes(2)
    said["second"] = SharedReplica(said["n0"].view._replace(replica_id=ReplicaId("second")), 1)
    heard.hear(said)
    said["second"] = with_more(said["second"], in_flight_count=2)
    assert heard.hear(said) == ["n0"]
    assert [view.in_flight_count for view in heard.links.remote[NodeId("n0")].replica_views()] == [0, 2]
