"""What becomes of a request when an attempt at it fails: it goes on elsewhere, begins anew, is finished here, or ends.

Decides over one request as a state machine: events in, effects out. One attempt runs at a time, every attempt is settled once, a node that
failed is not asked again, and after `ATTEMPTS_MAX` attempts, `REFUSALS_MAX` refusals or the deadline it is over. Only until the first token
another may run beside it, the hedge: whichever gives its first token first is the attempt that runs, and the other is dropped. Whether an
answer may be continued at all is `continuing`'s to say, whether hedging is worth it `hedging`'s; it comes here as a fact. It must not know
links, holds, queues or what was asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from potluck_coordinator.domain.hedging import HedgeEnd
from potluck_protocol.errors import ErrorCode

if TYPE_CHECKING:
    from potluck_protocol.values import NodeId

ATTEMPTS_MAX: Final = 3
"""Of one request, a hedge included. What a node would not take was none: nothing was done."""
REFUSALS_MAX: Final = 8
"""Of one request; who refuses time after time is suspected meanwhile, and others come before it."""


class Stage(StrEnum):
    """Where a request stands."""

    PLACING = "placing"
    RUNNING = "running"
    OVER = "over"


class Failure(StrEnum):
    """What an attempt's end says about trying elsewhere."""

    REFUSED = "refused"
    """Its node would not take it; nothing was done."""
    OUTDATED = "outdated"
    """It was sent where another gateway had just taken the last slot; nothing was done, and the node may be asked again."""
    LOST = "lost"
    """Its node is gone, silent, or wants its machine back, or its engine failed: another may do better."""
    UNFIT = "unfit"
    """Its engine says that the body is at fault: the client's, or the one that we made of it to go on. An engine that is broken says so,
    too: of the client's own body another is asked, once and only where that takes nobody's room."""
    FATAL = "fatal"
    """No node would do better: the request kills engines, cannot be paid, or the coordinator itself stops."""


_FAILURES: Final = {
    ErrorCode.NO_CAPACITY: Failure.REFUSED,
    ErrorCode.QUEUE_FULL: Failure.OUTDATED,
    ErrorCode.NODE_LOST: Failure.LOST,
    ErrorCode.ENGINE_FAILED: Failure.LOST,
    ErrorCode.INVALID_REQUEST: Failure.UNFIT,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: Failure.UNFIT,
}


_UNDONE: Final = frozenset({Failure.REFUSED, Failure.OUTDATED})


def failure_of(code: ErrorCode, *, for_good: bool) -> Failure:
    """What an attempt's error means; `for_good` where this side broke it off, as at its deadline."""
    return Failure.FATAL if for_good else _FAILURES.get(code, Failure.FATAL)


@dataclass(frozen=True, slots=True)
class Said:
    """What has reached the client."""

    anything: bool = False
    """More than the head of an answer: text, or whatever else a model says."""
    whole: bool = False
    """Nothing of the answer itself is missing: only the usage record, or the end."""
    why_not: str | None = None
    """Why what was said cannot be continued elsewhere; None: it can."""


class Course(NamedTuple):
    """One request's way so far."""

    stage: Stage = Stage.PLACING
    attempt_count: int = 0
    refusal_count: int = 0
    node_id: NodeId | None = None
    """Whose attempt runs."""
    excluded: frozenset[NodeId] = frozenset()
    was_lost: bool = False
    """An attempt that had begun failed: the client is told of that, not of what came after."""
    continuing: bool = False
    """What is placed or runs goes on behind text that has reached the client."""
    body_refused: bool = False
    """An engine has refused the client's body, and another is asked whether it takes it."""
    hedge_node_id: NodeId | None = None
    """Whose second attempt runs beside it."""
    was_hedged: bool = False
    """Once is all that a request gets."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """An attempt runs."""

    node_id: NodeId


@dataclass(frozen=True, slots=True)
class Unplaced:
    """There is no replica for it, or no slot came free in time."""


@dataclass(frozen=True, slots=True)
class Broke:
    """The attempt that runs has failed."""

    failure: Failure
    said: Said
    seconds_left: float
    """Until the request's deadline."""


@dataclass(frozen=True, slots=True)
class Hedged:
    """A second attempt runs beside the first."""

    node_id: NodeId


@dataclass(frozen=True, slots=True)
class Began:
    """The attempt that runs has given its first token."""


@dataclass(frozen=True, slots=True)
class Outrun:
    """The hedge has given its first token, and the attempt that runs has not."""


@dataclass(frozen=True, slots=True)
class HedgeBroke:
    """The hedge has failed."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The attempt that runs has come to its good end."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Nobody waits for the answer any more."""


Event = Dispatched | Unplaced | Broke | Hedged | Began | Outrun | HedgeBroke | Completed | Abandoned


@dataclass(frozen=True, slots=True)
class Settle:
    """Pay the attempt that ran for what came of it, and free its slot."""


@dataclass(frozen=True, slots=True)
class Place:
    """Start the next attempt, elsewhere."""

    excluded: frozenset[NodeId]
    continuing: bool
    """From the text so far; otherwise from the beginning."""
    if_spare: bool = False
    """Only where there is room now that nobody waits for."""


@dataclass(frozen=True, slots=True)
class DropHedge:
    """Cancel the hedge: nothing of it is paid or held against its node."""

    end: HedgeEnd


@dataclass(frozen=True, slots=True)
class TakeHedge:
    """The hedge is the attempt that runs from now on."""

    end: HedgeEnd


@dataclass(frozen=True, slots=True)
class Finish:
    """Say what is missing at the end of a whole answer."""


@dataclass(frozen=True, slots=True)
class End:
    """The client is told of a failure."""

    tells_loss: bool
    """Of the first attempt that was lost; otherwise of what just happened."""
    why: str | None = None
    """Why nobody goes on with the answer, where its text is the reason."""
    tells_refusal: bool = False
    """Of the engine's that refused the body: nobody else has answered it."""


Effect = Settle | Place | DropHedge | TakeHedge | Finish | End


def may_be_hedged(course: Course) -> bool:
    """Whether a second attempt may begin beside the one that runs. After a loss the tries that are left are kept for losses."""
    unhurt = not (course.was_hedged or course.was_lost or course.continuing or course.body_refused)
    return course.stage is Stage.RUNNING and unhurt and course.attempt_count < ATTEMPTS_MAX


def advance(course: Course, event: Event) -> tuple[Course, tuple[Effect, ...]]:
    """The request after an event, and what is to be done, in this order. Once it is over, nothing is.

    Raises:
        ValueError: the event cannot happen at this stage.
    """
    match course.stage, event:
        case Stage.OVER, Completed() | Abandoned():
            return course, ()
        case Stage.PLACING, Dispatched(node_id):
            running = course._replace(stage=Stage.RUNNING, node_id=node_id, attempt_count=course.attempt_count + 1)
            return running, ()
        case Stage.PLACING, Unplaced():
            return _over(course), (End(course.was_lost and not course.body_refused, tells_refusal=course.body_refused),)
        case Stage.PLACING, Abandoned():
            return _over(course), ()
        case Stage.RUNNING, Completed():
            return _over(course), (*_dropped(course, HedgeEnd.LOST), Settle())
        case Stage.RUNNING, Abandoned():
            return _over(course), (*_dropped(course, HedgeEnd.GIVEN_UP), Settle())
        case Stage.RUNNING, Broke():
            return _after_break(course, event)
        case Stage.RUNNING, Hedged() | Began() | Outrun() | HedgeBroke():
            return _in_the_race(course, event)
        case _:
            raise ValueError(f"{type(event).__name__} at the stage {course.stage}")


def _in_the_race(course: Course, event: Hedged | Began | Outrun | HedgeBroke) -> tuple[Course, tuple[Effect, ...]]:
    alone = course if course.hedge_node_id is None else course._replace(hedge_node_id=None)
    match event:
        case Hedged(node_id) if may_be_hedged(course) and node_id not in course.excluded | {course.node_id}:
            return course._replace(hedge_node_id=node_id, was_hedged=True, attempt_count=course.attempt_count + 1), ()
        case Began():
            return alone, _dropped(course, HedgeEnd.LOST)
        case Outrun() if course.hedge_node_id is not None:
            return alone._replace(node_id=course.hedge_node_id), (Settle(), TakeHedge(HedgeEnd.WON))
        case HedgeBroke() if course.hedge_node_id is not None:
            return alone._replace(excluded=course.excluded | {course.hedge_node_id}), _dropped(course, HedgeEnd.FAILED)
        case _:
            raise ValueError(f"{type(event).__name__} at the stage {course.stage}, hedged: {course.hedge_node_id is not None}")


def _after_break(course: Course, broke: Broke) -> tuple[Course, tuple[Effect, ...]]:
    if course.hedge_node_id is not None:
        return _after_hedged_break(course, broke)
    assert course.node_id is not None, "an attempt runs somewhere"
    failure, said = broke.failure, broke.said
    may_be_asked_again = failure is Failure.OUTDATED and not said.anything
    excluded = course.excluded if may_be_asked_again else course.excluded | {course.node_id}
    # Whoever has said something cannot refuse any more.
    was_lost = course.was_lost or failure is Failure.LOST or said.anything
    if said.whole and failure is not Failure.FATAL:
        return _over(course), (Settle(), Finish())
    # Of a body that was made here to go on, the client knows nothing.
    tells_loss = course.was_lost and (failure in _UNDONE | {Failure.LOST} or (failure is Failure.UNFIT and course.continuing))
    if failure in _UNDONE and not said.anything:
        course = course._replace(attempt_count=course.attempt_count - 1, refusal_count=course.refusal_count + 1)
    if course.body_refused and not said.anything:
        return _over(course), (Settle(), End(tells_loss=False, tells_refusal=failure is not Failure.UNFIT))
    is_spent = course.attempt_count >= ATTEMPTS_MAX or course.refusal_count >= REFUSALS_MAX or broke.seconds_left <= 0
    if failure is Failure.UNFIT and not (said.anything or course.continuing or is_spent):
        asked = course._replace(stage=Stage.PLACING, node_id=None, excluded=excluded, body_refused=True)
        return asked, (Settle(), Place(excluded, continuing=False, if_spare=True))
    if failure in {Failure.FATAL, Failure.UNFIT} or is_spent:
        return _over(course), (Settle(), End(tells_loss))
    if said.anything and said.why_not is not None:
        return _over(course), (Settle(), End(tells_loss, said.why_not))
    on = course._replace(
        stage=Stage.PLACING,
        node_id=None,
        excluded=excluded,
        was_lost=was_lost,
        continuing=said.anything,
        body_refused=False,
    )
    return on, (Settle(), Place(excluded, continuing=said.anything))


def _after_hedged_break(course: Course, broke: Broke) -> tuple[Course, tuple[Effect, ...]]:
    """The hedge goes on alone where the request would have gone to another node from its beginning; otherwise it ends with the first."""
    alone = course._replace(hedge_node_id=None)
    if broke.failure is not Failure.FATAL and not broke.said.anything and broke.seconds_left > 0:
        assert course.node_id is not None, "an attempt runs somewhere"
        excluded, was_lost = course.excluded | {course.node_id}, course.was_lost or broke.failure is Failure.LOST
        is_unfit = broke.failure is Failure.UNFIT
        taken = alone._replace(node_id=course.hedge_node_id, excluded=excluded, was_lost=was_lost, body_refused=is_unfit)
        return taken, (Settle(), TakeHedge(HedgeEnd.REPLACED))
    on, effects = _after_break(alone, broke)
    return on, (*_dropped(course, HedgeEnd.LOST if broke.said.anything else HedgeEnd.GIVEN_UP), *effects)


def _dropped(course: Course, end: HedgeEnd) -> tuple[Effect, ...]:
    return () if course.hedge_node_id is None else (DropHedge(end),)


def _over(course: Course) -> Course:
    return course._replace(stage=Stage.OVER, node_id=None, hedge_node_id=None)
