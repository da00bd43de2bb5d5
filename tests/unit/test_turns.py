"""Who may measure its line now: one at a time of a node, few of a gateway, and not again and again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.turns import REPEAT_SECONDS, RETRY_SECONDS, TOGETHER_MAX, Direction, Refusal, Turns, begin, end
from potluck_protocol.values import NodeId

UP, DOWN = Direction.UPLOAD, Direction.DOWNLOAD
ANA, BEA, CAT = NodeId("ana"), NodeId("bea"), NodeId("cat")


def after(*words: tuple[NodeId, Direction, float] | NodeId) -> Turns:
    """The turns after these beginnings, which all must be granted, and ends."""
    turns = Turns()
    for word in words:
        if isinstance(word, str):
            turns = end(turns, word)
        else:
            begun = begin(turns, *word)
            assert isinstance(begun, Turns)
            turns = begun
    return turns


@pytest.mark.parametrize(
    ("turns", "wish", "retry_after_seconds"),
    [
        (after(), (ANA, UP, 0.0), None),
        (after((ANA, UP, 0.0)), (ANA, UP, 1.0), RETRY_SECONDS),
        (after((ANA, UP, 0.0)), (ANA, DOWN, 1.0), RETRY_SECONDS),
        (after((ANA, UP, 0.0), ANA), (ANA, DOWN, 2.0), None),
        (after((ANA, UP, 0.0), ANA), (ANA, UP, 30.0), REPEAT_SECONDS - 30),
        (after((ANA, UP, 0.0), ANA), (ANA, UP, REPEAT_SECONDS), None),
        (after((ANA, UP, 0.0)), (BEA, UP, 1.0), None),
        (after((ANA, UP, 0.0), (BEA, DOWN, 0.0)), (CAT, UP, 1.0), RETRY_SECONDS),
        (after((ANA, UP, 0.0), (BEA, DOWN, 0.0), BEA), (CAT, UP, 1.0), None),
    ],
)
def test_who_may_measure_and_who_comes_again(
    turns: Turns, wish: tuple[NodeId, Direction, float], retry_after_seconds: float | None
) -> None:
    found = begin(turns, *wish)
    assert (found.retry_after_seconds if isinstance(found, Refusal) else None) == retry_after_seconds


wishes = st.lists(st.tuples(st.sampled_from([ANA, BEA, CAT, NodeId("dan")]), st.sampled_from(Direction), st.floats(0, 60), st.booleans()))


@given(wishes)
def test_whoever_asks_in_whatever_order_the_bounds_hold_and_a_refused_one_may_come_when_it_was_told(
    script: list[tuple[NodeId, Direction, float, bool]],
) -> None:
    turns, now = Turns(), 0.0
    begun_at: dict[tuple[NodeId, Direction], float] = {}
    for node_id, direction, pause_seconds, ends in script:
        now += pause_seconds
        found = begin(turns, node_id, direction, now)
        if isinstance(found, Refusal):
            assert 0 < found.retry_after_seconds <= REPEAT_SECONDS
            # Once everyone is through, the time that was told is late enough.
            rest = turns
            for other in turns.running:
                rest = end(rest, other)
            assert isinstance(begin(rest, node_id, direction, now + found.retry_after_seconds + 1e-6), Turns) or node_id in turns.running
        else:
            last = begun_at.get((node_id, direction))
            assert last is None or now - last >= REPEAT_SECONDS
            begun_at[node_id, direction] = now
            turns = found
            assert all(now - seconds < REPEAT_SECONDS for seconds in turns.begun_at.values()), "old beginnings are forgotten"
        assert len(turns.running) <= TOGETHER_MAX
        if ends:
            turns = end(turns, node_id)
