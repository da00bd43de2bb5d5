"""The state machine of one request: what follows each failure, and what holds over every course that it can take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.requests import (
    ATTEMPTS_MAX,
    REFUSALS_MAX,
    Abandoned,
    Broke,
    Completed,
    Course,
    Dispatched,
    End,
    Failure,
    Finish,
    Place,
    Said,
    Settle,
    Stage,
    Unplaced,
    advance,
    failure_of,
    may_be_hedged,
)
from potluck_protocol.errors import ErrorCode
from potluck_protocol.values import NodeId

NODE, OTHER = NodeId("a"), NodeId("b")
NOTHING, TEXT, WHOLE = Said(), Said(anything=True), Said(anything=True, whole=True)
TOOLS = Said(anything=True, why_not="it may call tools")


def running(**changes) -> Course:
    course, effects = advance(Course(), Dispatched(NODE))
    assert effects == ()
    return course._replace(**changes)


def after(course: Course, failure: Failure, said: Said, seconds_left: float = 100.0):
    return advance(course, Broke(failure, said, seconds_left))[1]


ELSEWHERE = frozenset({NODE})


@pytest.mark.parametrize(
    ("failure", "said", "effects"),
    [
        (Failure.LOST, NOTHING, (Settle(), Place(ELSEWHERE, continuing=False))),
        (Failure.LOST, TEXT, (Settle(), Place(ELSEWHERE, continuing=True))),
        (Failure.LOST, TOOLS, (Settle(), End(tells_loss=False, why="it may call tools"))),
        (Failure.LOST, WHOLE, (Settle(), Finish())),
        (Failure.LOST, replace(TOOLS, whole=True), (Settle(), Finish())),
        (Failure.REFUSED, NOTHING, (Settle(), Place(ELSEWHERE, continuing=False))),
        (Failure.REFUSED, TEXT, (Settle(), Place(ELSEWHERE, continuing=True))),
        (Failure.OUTDATED, NOTHING, (Settle(), Place(frozenset(), continuing=False))),
        (Failure.OUTDATED, TEXT, (Settle(), Place(ELSEWHERE, continuing=True))),
        (Failure.UNFIT, NOTHING, (Settle(), Place(ELSEWHERE, continuing=False, if_spare=True))),
        (Failure.UNFIT, TEXT, (Settle(), End(tells_loss=False))),
        (Failure.FATAL, NOTHING, (Settle(), End(tells_loss=False))),
        (Failure.FATAL, TEXT, (Settle(), End(tells_loss=False))),
        (Failure.FATAL, WHOLE, (Settle(), End(tells_loss=False))),
    ],
)
def test_what_follows_the_first_attempts_failure(failure, said, effects):
    assert after(running(), failure, said) == effects


@pytest.mark.parametrize("failure", [Failure.LOST, Failure.REFUSED, Failure.OUTDATED])
def test_nothing_follows_the_last_attempt_or_the_deadline(failure):
    assert after(running(attempt_count=ATTEMPTS_MAX, was_lost=True), failure, TEXT) == (Settle(), End(tells_loss=True))
    assert after(running(), failure, TEXT, seconds_left=0.0) == (Settle(), End(tells_loss=False))


@pytest.mark.parametrize(
    ("course", "failure", "tells_loss"),
    [
        (running(attempt_count=ATTEMPTS_MAX, was_lost=True, continuing=True), Failure.UNFIT, True),
        (running(was_lost=True, continuing=False), Failure.UNFIT, False),
        (running(was_lost=True, continuing=True), Failure.FATAL, False),
    ],
)
def test_the_client_is_told_of_the_loss_unless_its_own_request_is_at_fault(course, failure, tells_loss):
    assert after(course, failure, TEXT) == (Settle(), End(tells_loss=tells_loss))


def test_without_a_replica_the_client_is_told_of_the_loss_if_there_was_one():
    assert advance(Course(), Unplaced())[1] == (End(tells_loss=False),)
    lost, _ = advance(running(), Broke(Failure.LOST, TEXT, 100.0))
    assert advance(lost, Unplaced())[1] == (End(tells_loss=True),)


@pytest.mark.parametrize(
    ("event", "effects"),
    [
        (Unplaced(), (End(tells_loss=False, tells_refusal=True),)),
        (Broke(Failure.UNFIT, NOTHING, 100.0), (Settle(), End(tells_loss=False))),
        (Broke(Failure.LOST, NOTHING, 100.0), (Settle(), End(tells_loss=False, tells_refusal=True))),
        (Broke(Failure.REFUSED, NOTHING, 100.0), (Settle(), End(tells_loss=False, tells_refusal=True))),
        (Broke(Failure.FATAL, NOTHING, 100.0), (Settle(), End(tells_loss=False, tells_refusal=True))),
        (Broke(Failure.LOST, TEXT, 100.0), (Settle(), Place(frozenset({NODE, OTHER}), continuing=True))),
        (Completed(), (Settle(),)),
    ],
)
@pytest.mark.parametrize("was_lost", [False, True])
def test_a_refused_body_is_shown_to_one_other_engine_and_the_client_hears_the_refusal_unless_that_one_answers(event, effects, was_lost):
    course, _ = advance(running(was_lost=was_lost), Broke(Failure.UNFIT, NOTHING, 100.0))
    assert course.stage is Stage.PLACING
    if not isinstance(event, Unplaced):
        course, _ = advance(course, Dispatched(OTHER))
        assert not may_be_hedged(course)
    assert advance(course, event)[1] == effects


def test_the_text_of_whoever_took_a_refused_body_is_continued_as_any_other():
    course, _ = advance(running(), Broke(Failure.UNFIT, NOTHING, 100.0))
    course, _ = advance(course, Dispatched(OTHER))
    course, _ = advance(course, Broke(Failure.LOST, TEXT, 100.0))
    assert advance(course, Unplaced())[1] == (End(tells_loss=True),)


@pytest.mark.parametrize("changes", [{"attempt_count": ATTEMPTS_MAX}, {"refusal_count": REFUSALS_MAX}, {"continuing": True}])
def test_nobody_else_is_asked_where_the_tries_are_spent_or_the_body_is_ours(changes):
    effects = after(running(**changes), Failure.UNFIT, NOTHING)
    assert effects == (Settle(), End(tells_loss=False))
    assert after(running(), Failure.UNFIT, NOTHING, seconds_left=0.0) == (Settle(), End(tells_loss=False))


@pytest.mark.parametrize("code", ErrorCode)
def test_only_what_another_node_may_do_better_is_tried_elsewhere(code):
    perhaps = {ErrorCode.INVALID_REQUEST, ErrorCode.CONTEXT_LENGTH_EXCEEDED}
    tried_elsewhere = {ErrorCode.NO_CAPACITY, ErrorCode.QUEUE_FULL, ErrorCode.NODE_LOST, ErrorCode.ENGINE_FAILED, *perhaps}
    goes_on = any(isinstance(effect, Place) for effect in after(running(), failure_of(code, for_good=False), NOTHING))
    assert goes_on is (code in tried_elsewhere)
    assert failure_of(code, for_good=True) is Failure.FATAL


SAID = st.one_of(
    st.just(NOTHING),
    st.builds(Said, anything=st.just(True), whole=st.booleans(), why_not=st.sampled_from([None, "it may call tools"])),
)
EVENT = st.one_of(
    st.builds(Dispatched, st.sampled_from([NodeId(name) for name in "abcde"])),
    st.just(Unplaced()),
    st.builds(Broke, st.sampled_from(Failure), SAID, st.floats(-1.0, 600.0)),
    st.just(Completed()),
    st.just(Abandoned()),
)


@given(st.lists(EVENT, max_size=12))
def test_every_course_runs_one_attempt_at_a_time_settles_each_once_and_ends(events):
    course = Course()
    begun = settled = 0
    for event in events:
        possible = {
            Stage.PLACING: (Dispatched, Unplaced, Abandoned),
            Stage.RUNNING: (Broke, Completed, Abandoned),
            Stage.OVER: (Completed, Abandoned),
        }[course.stage]
        if not isinstance(event, possible):
            with pytest.raises(ValueError, match="at the stage"):
                advance(course, event)
            continue
        if isinstance(event, Dispatched) and event.node_id in course.excluded:
            continue  # placement is told
        before = course
        course, effects = advance(course, event)
        begun += isinstance(event, Dispatched)
        settled += effects.count(Settle())
        assert settled <= begun <= settled + 1
        assert (begun - settled == 1) is (course.stage is Stage.RUNNING)
        assert begun - course.refusal_count <= ATTEMPTS_MAX
        assert course.refusal_count <= REFUSALS_MAX
        assert before.excluded <= course.excluded
        is_outdated = isinstance(event, Broke) and event.failure is Failure.OUTDATED and not event.said.anything
        may_ask_again = before.node_id is None or course.stage is not Stage.PLACING or is_outdated
        assert may_ask_again or before.node_id in course.excluded
        for effect in effects:
            check(effect, event, course)
        if before.stage is Stage.OVER:
            assert (course, effects) == (before, ())
    for _ in range(ATTEMPTS_MAX + 1):
        if course.stage is Stage.PLACING:
            course, _ = advance(course, Dispatched(NodeId(f"new {len(course.excluded)}")))
        if course.stage is Stage.RUNNING:
            course, _ = advance(course, Broke(Failure.LOST, TEXT, 100.0))
    assert course.stage is Stage.OVER, "whatever happens, it ends"


def check(effect, event, course) -> None:
    if isinstance(effect, Place):
        assert isinstance(event, Broke)
        assert effect.excluded == course.excluded
        assert effect.continuing is event.said.anything, "restarted only where nothing reached the client"
        assert not event.said.anything or (event.said.why_not is None and not event.said.whole)
        assert effect.if_spare is course.body_refused is (event.failure is Failure.UNFIT)
        assert event.failure is not Failure.FATAL
        assert event.seconds_left > 0
        assert not (effect.if_spare and effect.continuing)
        assert course.was_lost or not effect.continuing, "the client has a part of an answer that somebody broke off"
    if isinstance(effect, Finish):
        assert isinstance(event, Broke)
        assert event.said.whole
    if isinstance(effect, End):
        assert not (effect.tells_loss and effect.tells_refusal)
    if isinstance(effect, End | Finish):
        assert course.stage is Stage.OVER


@pytest.mark.parametrize("failure", [Failure.REFUSED, Failure.OUTDATED])
def test_a_refusal_uses_up_no_attempt_and_refusals_have_a_bound_of_their_own(failure):
    course = Course()
    for number in range(REFUSALS_MAX):
        assert course.stage is Stage.PLACING
        course, _ = advance(course, Dispatched(NodeId(f"n{number}")))
        course, effects = advance(course, Broke(failure, NOTHING, 100.0))
    assert (course.stage, effects) == (Stage.OVER, (Settle(), End(tells_loss=False)))
    after_two, _ = advance(Course(Stage.RUNNING, 3, 2, NodeId("a")), Broke(failure, NOTHING, 100.0))
    assert (after_two.stage, after_two.attempt_count, after_two.refusal_count) == (Stage.PLACING, 2, 3)
