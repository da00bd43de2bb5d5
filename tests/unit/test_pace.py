"""How many answers a replica writes at a time, so that each keeps the promised pace: by the function, and in a gateway's queue."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from potluck_coordinator.domain.admission import WaitsFor
from potluck_coordinator.domain.pace import PACE_SHARE, SAMPLES_MIN, STRETCH_MIN, slots_in_pace
from potluck_coordinator.domain.speeds import AttemptTimes, Speeds, learned, prior
from potluck_protocol.values import AccountId, ReplicaId, RequestId
from tests.support.request_queue import MODEL, SLOTS, Front, settle

PACE = 0.1
"""Of a promise; 90 ms are aimed at."""


def known(base, each, *, batch=4.0, told=0.0, samples=50):
    return Speeds(1000.0, base, each, samples, samples, 0.0, batch, told)


@pytest.mark.parametrize(
    ("slot_count", "speeds", "weight", "expected"),
    [
        (8, known(0.02, 0.001), 1.0, 8),  # 28 ms at eight: all of them
        (64, known(0.02, 0.002), 1.0, 35),  # 20 + 35 x 2 = 90
        (64, known(0.04, 0.004), 1.0, 12),  # at half of that speed
        (64, known(0.02, 0.002), 0.5, 12),  # and where only half of it is believed
        (64, known(0.02, 0.002, samples=SAMPLES_MIN - 1), 1.0, 64),  # what was hardly seen bounds nothing
        (64, known(0.02, 0.0), 1.0, 64),  # a batch costs nothing there
        (64, known(0.2, 0.02, batch=8.0), 1.0, 2),  # 360 ms at eight: a quarter of them, and less again next time
        (64, known(0.2, 0.02, batch=1.0), 1.0, 1),
        (64, known(0.2, 0.02, told=0.2), 1.0, 5),  # slow by nature: 300 ms are one and a half times as long as alone
        (1, known(9.0, 9.0), 1.0, 1),
        (0, known(0.02, 0.001), 1.0, 0),
    ],
)
def test_a_batch_is_as_large_as_its_pace_allows(slot_count, speeds, weight, expected):
    assert slots_in_pace(slot_count, speeds, weight, PACE) == expected


seconds = st.floats(1e-4, 20)
speeds_seen = st.builds(known, seconds, st.floats(0, 5), batch=st.floats(1, 300), told=st.just(0.0) | seconds, samples=st.integers(0, 100))


@given(st.integers(0, 300), speeds_seen, st.floats(0.01, 1), st.floats(0.001, 60))
def test_it_never_takes_the_last_slot_nor_adds_one_and_what_stays_keeps_the_pace(slot_count, speeds, weight, pace):
    kept = slots_in_pace(slot_count, speeds, weight, pace)
    assert min(1, slot_count) <= kept <= slot_count
    bearable = max(PACE_SHARE * pace * weight, STRETCH_MIN * speeds.told_token_seconds)
    if kept > 1 and speeds.decode_sample_count >= SAMPLES_MIN and speeds.decode_base_seconds < bearable:
        assert speeds.decode_seconds(kept) <= bearable * (1 + 1e-9)


@given(st.integers(0, 300), speeds_seen, st.floats(0.001, 60), st.floats(1.0, 10.0))
def test_a_slower_pace_never_leaves_fewer(slot_count, speeds, pace, factor):
    # Where no batch is small enough, a guess has to do, and it is bolder than the line where that begins to say something.
    assume(speeds.decode_base_seconds < PACE_SHARE * pace)
    assert slots_in_pace(slot_count, speeds, 1.0, pace) <= slots_in_pace(slot_count, speeds, 1.0, pace * factor)


def attempt(base, each, batch):
    return AttemptTimes(0.0, 0.0, 101, 100 * (base + each * batch), batch)


@pytest.mark.parametrize(("base", "each"), [(0.03, 0.004), (0.06, 0.002), (0.0, 0.03), (0.3, 0.0)])
def test_whatever_a_replica_is_it_comes_to_a_batch_that_keeps_the_pace_or_to_one(base, each):
    """The bound decides the batch, and that is all that the next attempt can teach."""
    speeds, slots = prior(None, None), 32
    for number in range(200):
        speeds = learned(speeds, attempt(base, each, slots), 10.0 * number)
        slots = slots_in_pace(32, speeds, 1.0, PACE)
    assert slots == 1 or base + each * slots <= PACE
    if base + each < 0.8 * PACE:
        assert base + each * (slots + 3) > PACE_SHARE * PACE, "and to no smaller one than it has to"


async def test_a_slow_replica_of_a_gateway_gets_fewer_at_a_time_and_whoever_waits_hears_why() -> None:
    front = Front()
    front.links.measures.token_seconds_max = PACE
    session = await front.joined("a")
    measured = front.links.measures._replica(ReplicaId("a/tiny"))

    def becomes(speeds: Speeds) -> tuple[int, int]:
        measured.speeds = speeds
        front.links.node_changed(session.node_id)
        (view,) = session.replica_views(MODEL)
        return view.slot_count, view.withheld_slot_count

    assert becomes(known(0.02, 0.001, batch=2.0)) == (SLOTS, 0)
    assert becomes(known(0.2, 0.1, batch=2.0)) == (1, SLOTS - 1)
    for _ in range(2):
        front.ask()
    await settle()
    assert len(session.requests) == 1
    waiting = front.requests.queues.waiting(AccountId("client"), RequestId("request"))
    assert waiting is not None
    assert waiting.waits_for is WaitsFor.PACE

    becomes(known(0.02, 0.001, batch=1.0))
    front.requests.queues.serve_all()
    await settle()
    assert len(session.requests) == 2
    await front.stop()
