"""The state machine of one request with two attempts until the first token: who goes on, and that it is never both."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.hedging import HedgeEnd
from potluck_coordinator.domain.requests import (
    ATTEMPTS_MAX,
    Abandoned,
    Began,
    Broke,
    Completed,
    Course,
    Dispatched,
    DropHedge,
    End,
    Failure,
    HedgeBroke,
    Hedged,
    Outrun,
    Place,
    Said,
    Settle,
    Stage,
    TakeHedge,
    Unplaced,
    advance,
    may_be_hedged,
)
from potluck_protocol.values import NodeId

FIRST, OTHER, THIRD = NodeId("a"), NodeId("b"), NodeId("c")
NOTHING, TEXT = Said(), Said(anything=True)


def hedged(**changes) -> Course:
    course, _ = advance(Course(), Dispatched(FIRST))
    course, effects = advance(course, Hedged(OTHER))
    assert effects == ()
    return course._replace(**changes)


def drop(end: HedgeEnd) -> DropHedge:
    return DropHedge(end)


@pytest.mark.parametrize(
    ("event", "effects", "node_id"),
    [
        (Began(), (drop(HedgeEnd.LOST),), FIRST),
        (Outrun(), (Settle(), TakeHedge(HedgeEnd.WON)), OTHER),
        (HedgeBroke(), (drop(HedgeEnd.FAILED),), FIRST),
        (Broke(Failure.LOST, NOTHING, 100.0), (Settle(), TakeHedge(HedgeEnd.REPLACED)), OTHER),
        (Broke(Failure.REFUSED, NOTHING, 100.0), (Settle(), TakeHedge(HedgeEnd.REPLACED)), OTHER),
        (Broke(Failure.LOST, NOTHING, 0.0), (drop(HedgeEnd.GIVEN_UP), Settle(), End(tells_loss=False)), None),
        (Broke(Failure.UNFIT, NOTHING, 100.0), (Settle(), TakeHedge(HedgeEnd.REPLACED)), OTHER),
        (Broke(Failure.UNFIT, NOTHING, 0.0), (drop(HedgeEnd.GIVEN_UP), Settle(), End(tells_loss=False)), None),
        (Broke(Failure.FATAL, NOTHING, 100.0), (drop(HedgeEnd.GIVEN_UP), Settle(), End(tells_loss=False)), None),
        (Broke(Failure.LOST, TEXT, 100.0), (drop(HedgeEnd.LOST), Settle(), Place(frozenset({FIRST}), continuing=True)), None),
        (Abandoned(), (drop(HedgeEnd.GIVEN_UP), Settle()), None),
        (Completed(), (drop(HedgeEnd.LOST), Settle()), None),
    ],
)
def test_what_follows_while_two_run(event, effects, node_id):
    course, followed = advance(hedged(), event)
    assert followed == effects
    assert (course.node_id, course.hedge_node_id) == (node_id, None)


def test_the_hedge_that_goes_on_alone_is_an_attempt_like_any_other():
    course, _ = advance(hedged(), Broke(Failure.LOST, NOTHING, 100.0))
    assert (course.attempt_count, course.excluded, course.was_lost) == (2, frozenset({FIRST}), True)
    after, effects = advance(course, Broke(Failure.LOST, NOTHING, 100.0))
    assert effects == (Settle(), Place(frozenset({FIRST, OTHER}), continuing=False))
    after, _ = advance(after, Dispatched(THIRD))
    assert advance(after, Broke(Failure.LOST, NOTHING, 100.0))[1] == (Settle(), End(tells_loss=True))


def test_the_hedge_of_a_refused_body_is_the_other_engine_that_is_asked():
    course, _ = advance(hedged(), Broke(Failure.UNFIT, NOTHING, 100.0))
    assert (course.body_refused, course.was_lost) == (True, False)
    assert advance(course, Broke(Failure.LOST, NOTHING, 100.0))[1] == (Settle(), End(tells_loss=False, tells_refusal=True))


def test_who_was_outrun_or_lost_the_race_may_be_asked_again_and_who_failed_not():
    won, _ = advance(hedged(), Outrun())
    assert advance(won, Broke(Failure.LOST, TEXT, 100.0))[1] == (Settle(), Place(frozenset({OTHER}), continuing=True))
    lost, _ = advance(hedged(), Began())
    assert advance(lost, Broke(Failure.LOST, TEXT, 100.0))[1] == (Settle(), Place(frozenset({FIRST}), continuing=True))
    failed, _ = advance(hedged(), HedgeBroke())
    assert advance(failed, Broke(Failure.LOST, NOTHING, 100.0))[1] == (Settle(), Place(frozenset({FIRST, OTHER}), continuing=False))


@pytest.mark.parametrize(
    "course",
    [
        Course(),
        hedged(),
        advance(hedged(), Began())[0],
        advance(hedged(), Abandoned())[0],
        Course(Stage.RUNNING, ATTEMPTS_MAX, node_id=FIRST),
        Course(Stage.RUNNING, 2, node_id=FIRST, was_lost=True),
        Course(Stage.RUNNING, 2, node_id=FIRST, continuing=True),
    ],
)
def test_a_request_is_hedged_once_and_not_after_a_loss(course):
    assert not may_be_hedged(course)
    with pytest.raises(ValueError, match="at the stage"):
        advance(course, Hedged(THIRD))


def test_the_hedge_runs_on_another_node_than_the_first_and_than_those_that_failed():
    course, _ = advance(Course(excluded=frozenset({THIRD})), Dispatched(FIRST))
    assert may_be_hedged(course)
    for node_id in (FIRST, THIRD):
        with pytest.raises(ValueError, match="Hedged"):
            advance(course, Hedged(node_id))


NODES = st.sampled_from([NodeId(name) for name in "abcdefg"])
SAID = st.one_of(st.just(NOTHING), st.builds(Said, anything=st.just(True), whole=st.booleans(), why_not=st.sampled_from([None, "tools"])))
EVENT = st.one_of(
    st.builds(Dispatched, NODES),
    st.builds(Hedged, NODES),
    st.just(Began()),
    st.just(Outrun()),
    st.just(HedgeBroke()),
    st.just(Unplaced()),
    st.builds(Broke, st.sampled_from(Failure), SAID, st.floats(-1.0, 600.0)),
    st.just(Completed()),
    st.just(Abandoned()),
)


def is_possible(course: Course, event: object) -> bool:
    match event:
        case Completed() | Abandoned():
            return course.stage is not Stage.PLACING or isinstance(event, Abandoned)
        case Dispatched() | Unplaced():
            return course.stage is Stage.PLACING
        case Hedged(node_id):
            return may_be_hedged(course) and node_id not in course.excluded | {course.node_id}
        case Outrun() | HedgeBroke():
            return course.hedge_node_id is not None
    return course.stage is Stage.RUNNING


@given(st.lists(EVENT, max_size=16))
def test_one_stream_is_read_at_a_time_one_of_two_is_dropped_and_every_one_is_ended(events):
    course = Course()
    begun = settled = hedges = dropped = taken = 0
    for event in events:
        if not is_possible(course, event):
            with pytest.raises(ValueError, match="at the stage"):
                advance(course, event)
            continue
        if isinstance(event, Dispatched) and event.node_id in course.excluded:
            continue  # placement is told
        before = course
        course, effects = advance(course, event)
        begun += isinstance(event, Dispatched)
        hedges += isinstance(event, Hedged)
        settled += effects.count(Settle())
        dropped += sum(isinstance(effect, DropHedge) for effect in effects)
        taken += sum(isinstance(effect, TakeHedge) for effect in effects)
        # Read are the attempts that were begun or taken and not settled: none or one, and which says the course.
        read = begun + taken - settled
        assert read == (course.stage is Stage.RUNNING)
        assert (course.node_id is not None) is (read == 1)
        # A hedge is dropped or taken, once, and runs until then.
        assert hedges - dropped - taken == (course.hedge_node_id is not None)
        assert hedges <= 1
        assert begun + hedges - course.refusal_count <= ATTEMPTS_MAX
        assert course.node_id is None or course.node_id != course.hedge_node_id
        assert not course.excluded & {course.node_id, course.hedge_node_id}, "who failed is not asked again"
        assert before.excluded <= course.excluded
        if any(isinstance(effect, TakeHedge) for effect in effects):
            assert effects[-2] == Settle(), "the first one's money is free before the hedge's is held"
            assert course.node_id == before.hedge_node_id
            assert not (isinstance(event, Broke) and event.said.anything), "never behind text of another"
        if course.stage is Stage.OVER:
            assert course.hedge_node_id is None
