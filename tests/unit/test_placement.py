"""Where a request goes, and what the losers are told."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.placement import ReplicaView, likeness, place, rejection, slots, slots_beside_owner, tokens_wanted
from potluck_protocol.values import Endpoint, ModelId, NodeId, ReplicaId
from tests.support.replicas import cohorts_of, replica_view

CHAT = Endpoint.CHAT_COMPLETIONS


def reasons(placement):
    return sorted((candidate.reason, candidate.replica_count) for candidate in placement.candidates)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"link_up": False}, "disconnected"),
        ({"node_suspect": True}, "suspect"),
        ({"node_paused": True}, "paused"),
        ({"ready": False}, "not ready"),
        ({"in_flight_count": 4}, "busy"),
        ({"endpoints": (Endpoint.EMBEDDINGS,)}, "without /v1/chat/completions"),
    ],
)
def test_each_reason_to_lose(changes, reason):
    placement = place(cohorts_of([replica_view("a", **changes), replica_view("b", in_flight_count=3)]), CHAT, frozenset(), 0.0)
    assert placement.chosen is not None
    assert placement.chosen.node_id == "b"
    assert reasons(placement) == sorted([(reason, 1), ("chosen", 1)])


def test_the_share_of_slots_decides_not_their_number():
    replicas = [replica_view("small", slot_count=2, in_flight_count=1), replica_view("large", slot_count=16, in_flight_count=6)]
    placement = place(cohorts_of(replicas), CHAT, frozenset(), 0.0)
    assert placement.chosen is replicas[1]
    assert reasons(placement) == [("chosen", 1), ("more loaded", 1)]


@pytest.mark.parametrize(
    ("in_flight_count", "waiting_count", "slot_count"), [(2, None, 4), (2, 0, 4), (2, 1, 2), (4, 9, 4), (0, 9, 1), (6, 1, 4)]
)
def test_an_engine_in_which_requests_wait_gets_no_more_of_the_pools_but_one(in_flight_count, waiting_count, slot_count):
    assert slots_beside_owner(4, in_flight_count, waiting_count) == slot_count


def test_an_excluded_node_stays_excluded():
    replicas = cohorts_of([replica_view("a"), replica_view("b")])
    assert place(replicas, CHAT, frozenset({NodeId("a")}), 0.0).chosen == replica_view("b")
    placement = place(replicas, CHAT, frozenset({NodeId("a"), NodeId("b")}), 0.0)
    assert placement.chosen is None
    assert placement.explanation() == "2 tried before"


def test_equals_share_the_work_by_the_draw():
    cohorts = cohorts_of([replica_view(name) for name in "abcd"] + [replica_view("busy", in_flight_count=1)])
    assert [place(cohorts, CHAT, frozenset(), draw).chosen.node_id for draw in (0.0, 0.26, 0.5, 0.99)] == ["a", "b", "c", "d"]
    unlike = cohorts_of([replica_view("a"), replica_view("b", context_length_tokens=100), replica_view("c")])
    assert [place(unlike, CHAT, frozenset(), draw).chosen.node_id for draw in (0.0, 0.4, 0.7)] == ["a", "c", "b"]


@pytest.mark.parametrize("field", [field.name for field in fields(ReplicaView)])
def test_replicas_are_alike_that_differ_in_their_names_alone(field):
    other = {
        "replica_id": ReplicaId("b"),
        "node_id": NodeId("b"),
        "model_id": ModelId("b"),
        "endpoints": (Endpoint.EMBEDDINGS,),
        "slot_count": 3,
        "in_flight_count": 1,
        "context_length_tokens": 9,
    }
    plain = replica_view()
    changed = replica_view(**{field: other[field] if field in other else not getattr(plain, field)})
    assert (likeness(plain) == likeness(changed)) is (field in {"replica_id", "node_id", "model_id"})


def test_without_replicas_it_says_so():
    assert place([], CHAT, frozenset(), 0.0).explanation() == "no node has this model"


views = st.builds(
    replica_view,
    name=st.text("abcdefgh", min_size=1, max_size=4),
    ready=st.booleans(),
    link_up=st.booleans(),
    node_paused=st.booleans(),
    node_suspect=st.booleans(),
    slot_count=st.integers(1, 64),
    in_flight_count=st.integers(0, 70) | st.integers(0, 2),
)


@given(
    st.lists(views, max_size=12, unique_by=lambda view: view.node_id),
    st.sets(st.text("abcdefgh", min_size=1, max_size=1).map(NodeId)).map(frozenset),
    st.floats(0, 1, exclude_max=True),
)
def test_the_choice_is_usable_least_loaded_and_every_loser_is_explained(replicas, excluded, draw):
    placement = place(cohorts_of(replicas), CHAT, excluded, draw)
    able = [replica for replica in replicas if rejection(replica, CHAT, excluded) is None]
    usable = [replica for replica in able if replica.in_flight_count < replica.slot_count]
    assert (placement.chosen is None) == (not usable)
    assert sum(candidate.replica_count for candidate in placement.candidates) == len(replicas)
    assert all(candidate.reason and candidate.replica_count > 0 for candidate in placement.candidates)
    assert sum(candidate.reason == "chosen" for candidate in placement.candidates) == bool(usable)
    assert sum(candidate.replica_count for candidate in placement.candidates if candidate.reason == "tried before") == sum(
        replica.node_id in excluded for replica in replicas
    )
    free = sum(replica.slot_count - replica.in_flight_count for replica in usable)
    assert slots(cohorts_of(replicas), CHAT, excluded, 0) == (sum(replica.slot_count for replica in able), free)
    if placement.chosen is not None:
        assert placement.chosen in usable
        share = (placement.chosen.in_flight_count + 1) / placement.chosen.slot_count
        assert share == min((replica.in_flight_count + 1) / replica.slot_count for replica in usable)


def test_a_replica_that_was_stepped_down_is_left_out_of_what_it_has_no_room_for():
    """A prompt of 6,000 tokens, and one node that came up with 2,048 for want of memory."""
    replicas = [replica_view("short", context_length_tokens=2048), replica_view("long", context_length_tokens=8192, in_flight_count=3)]
    cohorts = cohorts_of(replicas)
    placement = place(cohorts, CHAT, frozenset(), 0.0, tokens_wanted(cohorts, CHAT, frozenset(), 6000, None))
    assert placement.chosen is replicas[1]
    assert reasons(placement) == [("chosen", 1), ("with a context of 2048 tokens, too short for it", 1)]
    assert place(cohorts, CHAT, frozenset(), 0.0, tokens_wanted(cohorts, CHAT, frozenset(), 100, 1000)).chosen is replicas[0]


@pytest.mark.parametrize(
    ("contexts", "prompt", "asked", "wanted"),
    [
        ((2048, 8192), 1000, None, 1001),
        ((2048, 8192), 1000, 4000, 5000),
        # Nobody has room for so long an answer; an engine may cut it, and nobody is left out of what others could not do either.
        ((2048, 4096), 1000, 4000, 1000),
        ((2048, 4096), 4096, None, 4096),
        # An embedding wants room for its input alone.
        ((512,), 512, 0, 512),
        # It does not say.
        ((0, 2048), 1000, 4000, 5000),
        ((), 10, 10, 10),
    ],
)
def test_room_is_asked_for_as_far_as_somebody_has_it(contexts, prompt, asked, wanted):
    replicas = [replica_view(str(number), context_length_tokens=tokens) for number, tokens in enumerate(contexts)]
    assert tokens_wanted(cohorts_of(replicas), CHAT, frozenset(), prompt, asked) == wanted


def test_an_engine_that_does_not_tell_its_context_takes_everything():
    replicas = cohorts_of([replica_view("old")])
    assert place(replicas, CHAT, frozenset(), 0.0, tokens_wanted(replicas, CHAT, frozenset(), 6000, None)).chosen is not None


@pytest.mark.parametrize("away", [{"leaving": True}, {"node_suspect": True}, {"node_paused": True}, {"link_up": False}, {"ready": False}])
def test_room_that_cannot_be_had_leaves_nobody_out(away):
    replicas = [replica_view("long", context_length_tokens=8192, **away), replica_view("short", context_length_tokens=4096)]
    assert tokens_wanted(cohorts_of(replicas), CHAT, frozenset(), 100, 5000) == 100
    tried = cohorts_of([replica_view("long", context_length_tokens=8192), replicas[1]])
    assert tokens_wanted(tried, CHAT, frozenset({NodeId("long")}), 100, 5000) == 100
    assert tokens_wanted(tried, CHAT, frozenset(), 100, 5000) == 5100
