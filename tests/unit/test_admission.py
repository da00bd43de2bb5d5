"""Dispatch, wait or refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.admission import AdmissionLimits, Admitted, ModelLoad, Refuse, Wait, admit
from potluck_protocol.errors import ErrorCode

LIMITS = AdmissionLimits(queue_length_max=4, queue_wait_seconds_max=30)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (ModelLoad(0, 0, 0, 1.0), Refuse(ErrorCode.NO_CAPACITY, 1.0)),
        (ModelLoad(4, 1, 0, 1.0), Admitted()),
        (ModelLoad(4, 1, 1, 1.0), Admitted()),  # what counts as free, nobody in the queue could take
        (ModelLoad(4, 1, 4, 1.0), Admitted()),  # however full the queue is
        (ModelLoad(4, 0, 3, 1.0), Wait(30)),
        (ModelLoad(4, 0, 4, 8.0), Refuse(ErrorCode.QUEUE_FULL, 10.0)),  # five requests of 8 s on four slots
        (ModelLoad(1, 0, 4, 100.0), Refuse(ErrorCode.QUEUE_FULL, 60.0)),  # never more than a client would honour
    ],
)
def test_the_table(load, expected):
    assert admit(load, LIMITS) == expected


def test_a_request_that_a_node_gave_back_has_no_second_deadline():
    full = ModelLoad(4, 0, 3, 1.0)
    assert [admit(full, AdmissionLimits(), waited) for waited in (12.0, 30.0, 45.0)] == [Wait(18), Wait(0), Wait(0)]
    assert admit(ModelLoad(4, 1, 0, 1.0), AdmissionLimits(), 45.0) == Admitted()


loads = st.builds(ModelLoad, st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.floats(0, 1e6))


@given(loads)
def test_a_refusal_always_says_when_to_come_back_and_the_queue_stays_bounded(load):
    decision = admit(load, LIMITS)
    if isinstance(decision, Refuse):
        assert LIMITS.retry_after_seconds_min <= decision.retry_after_seconds <= LIMITS.retry_after_seconds_max
    if isinstance(decision, Wait):
        assert load.queued_count < LIMITS.queue_length_max
