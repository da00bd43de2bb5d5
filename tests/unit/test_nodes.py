"""When silence means something: examples of the lease rules."""

from __future__ import annotations

import pytest

from potluck_coordinator.domain.nodes import (
    Liveness,
    LivenessLimits,
    SignsOfLife,
    attempt_is_silent,
    lapsed_nodes,
    link_grace_is_over,
    liveness,
)
from potluck_protocol.values import NodeId

LIMITS = LivenessLimits()


@pytest.mark.parametrize(
    ("heartbeat_at", "busy_since", "now", "expected"),
    [
        (0.0, None, 0.0, Liveness.FRESH),
        (0.0, None, 12.4, Liveness.FRESH),  # idle: a beat each 5 s, two and a half missed
        (0.0, None, 12.6, Liveness.SUSPECT),
        (0.0, None, 14.9, Liveness.SUSPECT),
        (0.0, None, 15.0, Liveness.LAPSED),
        (0.0, 0.0, 2.4, Liveness.FRESH),  # busy: a beat each second
        (0.0, 0.0, 2.6, Liveness.SUSPECT),
        (0.0, 4.9, 6.0, Liveness.FRESH),  # it was rightly silent before it got work
        (0.0, 4.9, 7.5, Liveness.SUSPECT),
        (0.0, 14.0, 15.0, Liveness.LAPSED),  # new work does not prolong a lease
    ],
)
def test_liveness_follows_the_table(heartbeat_at, busy_since, now, expected):
    assert liveness(SignsOfLife(heartbeat_at, busy_since), now, LIMITS) is expected


@pytest.mark.parametrize(
    ("heartbeat_at", "chunk_at", "now", "silent"),
    [
        (0.0, 0.0, 7.9, False),
        (0.0, 0.0, 8.0, True),
        (7.5, 0.0, 8.0, False),  # the node beats: its engine may be at a long prompt
        (0.0, 5.0, 8.0, False),  # tokens came although heartbeats did not
    ],
)
def test_a_silent_attempt_needs_a_suspect_node(heartbeat_at, chunk_at, now, silent):
    assert attempt_is_silent(SignsOfLife(heartbeat_at, 0.0), chunk_at, now, LIMITS) is silent


def signs(count, heartbeat_at):
    return [(NodeId(f"{heartbeat_at}-{index}"), SignsOfLife(heartbeat_at, None)) for index in range(count)]


@pytest.mark.parametrize(("link_lost_at", "now", "over"), [(None, 99.0, False), (5.0, 5.9, False), (5.0, 6.0, True), (5.0, 9.0, True)])
def test_a_broken_link_has_a_second_to_come_back(link_lost_at, now, over):
    assert link_grace_is_over(link_lost_at, now, LIMITS) is over


def test_single_nodes_lapse_on_time():
    silent = signs(3, 0.0)
    assert lapsed_nodes(silent + signs(20, 14.0), 15.0, LIMITS) == {node_id for node_id, _ in silent}


def test_when_many_lapse_at_once_the_coordinator_suspects_itself_first():
    silent = signs(8, 0.0)
    assert lapsed_nodes(silent + signs(8, 14.0), 15.0, LIMITS) == frozenset()
    assert lapsed_nodes(silent + signs(8, 29.0), 29.9, LIMITS) == frozenset()
    assert lapsed_nodes(silent + signs(8, 29.0), 30.0, LIMITS) == {node_id for node_id, _ in silent}
