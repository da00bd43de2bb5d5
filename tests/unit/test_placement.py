"""Where a request goes, and what the losers are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.placement import place
from potluck_protocol.values import Endpoint, NodeId
from tests.support.replicas import replica_view

CHAT = Endpoint.CHAT_COMPLETIONS


def reasons(placement):
    return {candidate.node_id: candidate.reason for candidate in placement.candidates}


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
    placement = place([replica_view("a", **changes), replica_view("b", in_flight_count=3)], CHAT, frozenset(), 0.0)
    assert placement.chosen is not None
    assert placement.chosen.node_id == "b"
    assert reasons(placement) == {"a": reason, "b": "chosen"}


def test_the_share_of_slots_decides_not_their_number():
    placement = place(
        [replica_view("small", slot_count=2, in_flight_count=1), replica_view("large", slot_count=16, in_flight_count=6)],
        CHAT,
        frozenset(),
        0.0,
    )
    assert reasons(placement) == {"small": "more loaded", "large": "chosen"}


def test_an_excluded_node_stays_excluded():
    placement = place([replica_view("a")], CHAT, frozenset({NodeId("a")}), 0.0)
    assert placement.chosen is None
    assert placement.explanation() == "1 tried before"


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
    in_flight_count=st.integers(0, 70),
)


@given(st.lists(views, max_size=12, unique_by=lambda view: view.node_id), st.floats(0, 1, exclude_max=True))
def test_the_choice_is_usable_least_loaded_and_every_loser_is_explained(replicas, draw):
    placement = place(replicas, CHAT, frozenset(), draw)
    usable = [
        r for r in replicas if r.ready and r.link_up and not r.node_paused and not r.node_suspect and r.in_flight_count < r.slot_count
    ]
    assert (placement.chosen is None) == (not usable)
    assert {candidate.node_id for candidate in placement.candidates} == {replica.node_id for replica in replicas}
    assert all(candidate.reason for candidate in placement.candidates)
    assert sum(candidate.reason == "chosen" for candidate in placement.candidates) == bool(usable)
    if placement.chosen is not None:
        assert placement.chosen in usable
        share = (placement.chosen.in_flight_count + 1) / placement.chosen.slot_count
        assert share == min((replica.in_flight_count + 1) / replica.slot_count for replica in usable)
