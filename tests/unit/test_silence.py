"""How long an engine may say nothing, and who counts as waiting for it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.silence import PREFILL_SECONDS_MAX, SILENCE_SECONDS_MAX, Silence, Verdict, judge, prefill_seconds_max
from potluck_node.engine_watches import EngineWatches
from potluck_node.engines.standstill import Standstill
from potluck_node.watchdog import ABSENCE_SECONDS_MIN, LOOK_SECONDS, Watchdog
from potluck_protocol.values import AttemptId, Endpoint, StartAttempt
from tests.support.engines import MovedClock
from tests.support.node_engine import REPLICA

NOBODY = Silence(0, 1e9, 0)


@pytest.mark.parametrize(
    ("streams", "documents", "verdict"),
    [
        (NOBODY, NOBODY, Verdict.SOUND),
        (Silence(1, 30.0, 0), NOBODY, Verdict.SOUND),
        (Silence(1, 30.1, 0), NOBODY, Verdict.HUNG),
        (Silence(1, 31.4, 150), NOBODY, Verdict.SOUND),  # 1.5 s for 150 bytes, where nothing was measured
        (Silence(1, 31.6, 150), NOBODY, Verdict.HUNG),
        (Silence(1, 129.0, 10_000), NOBODY, Verdict.SOUND),
        (Silence(1, 131.0, 10_000), NOBODY, Verdict.HUNG),
        (Silence(1, 331.0, 1 << 24), NOBODY, Verdict.HUNG),  # however long the prompt
        (Silence(1, 59.0, 10_000, 1_000.0), NOBODY, Verdict.SOUND),  # a third of what was measured
        (Silence(1, 61.0, 10_000, 1_000.0), NOBODY, Verdict.HUNG),
        (Silence(1, 32.0, 10_000, 1e9), NOBODY, Verdict.SOUND),  # no engine is believed to be that fast
        (Silence(1, 33.0, 10_000, 1e9), NOBODY, Verdict.HUNG),
        (NOBODY, Silence(1, 31.0, 0), Verdict.ASK),
        (Silence(1, 29.0, 0), Silence(1, 31.0, 0), Verdict.ASK),
        (Silence(1, 31.0, 0), Silence(1, 31.0, 0), Verdict.HUNG),
    ],
)
def test_verdicts(streams, documents, verdict):
    assert judge(streams, documents) is verdict


@given(st.integers(0, 1 << 25), st.none() | st.floats(0, 1e12))
def test_the_allowance_grows_with_what_is_to_be_read_and_is_bounded(prompt_bytes, rate):
    allowed = prefill_seconds_max(prompt_bytes, rate)
    assert 0 <= allowed <= PREFILL_SECONDS_MAX
    assert prefill_seconds_max(prompt_bytes + 1, rate) >= allowed
    assert prefill_seconds_max(prompt_bytes, 0.0) >= allowed


class Listening:
    def __init__(self) -> None:
        self.now = 0.0
        self.standstill = Standstill(lambda: self.now)

    def silent_seconds(self) -> float:
        return self.standstill.silence.silent_seconds if self.standstill.silence.listening_count else 0.0


async def test_a_client_that_reads_slowly_is_no_standstill():
    listening = Listening()
    await listening.standstill.hear(asyncio.sleep(0))
    listening.now += 1_000
    assert not listening.standstill.silence.is_too_long
    words = asyncio.get_running_loop().create_future()
    hearing = asyncio.create_task(listening.standstill.hear(words))
    await asyncio.sleep(0)
    assert not listening.standstill.silence.is_too_long
    listening.now += SILENCE_SECONDS_MAX + 1
    assert listening.standstill.silence.is_too_long
    words.set_result(b"")
    await hearing
    assert not listening.standstill.silence.is_too_long


def test_any_word_counts_for_everyone_who_waits():
    listening = Listening()
    first = listening.standstill.listen()
    listening.now += 20
    second = listening.standstill.listen()
    listening.now += 9
    assert listening.silent_seconds() == 29
    second.heard()
    assert listening.silent_seconds() == 0
    second.close()
    listening.now += 5
    assert listening.silent_seconds() == 5
    first.close()
    assert listening.silent_seconds() == 0


def test_time_at_a_slow_client_and_time_without_anybody_is_not_silence():
    listening = Listening()
    ear = listening.standstill.listen()
    listening.now += 10
    ear.turn_away()
    ear.turn_away()
    listening.now += 1_000
    ear.turn_back()
    ear.turn_back()
    assert listening.silent_seconds() == 10
    ear.heard()
    ear.close()
    ear.close()
    listening.now += 1_000
    other = listening.standstill.listen()
    assert listening.silent_seconds() == 0
    listening.now += 12
    other.close()
    listening.now += 1_000
    listening.standstill.listen()
    assert listening.silent_seconds() == 12, "whoever gave up had waited in vain"


def test_what_is_left_unread_by_those_who_gave_up_counts_until_the_engine_speaks():
    listening = Listening()
    listening.standstill.listen(500).close()
    ear = listening.standstill.listen(2_000)
    assert listening.standstill.silence.unread_prompt_bytes == 2_500
    listening.now += 4
    ear.heard()
    assert listening.standstill.silence.unread_prompt_bytes == 0
    assert listening.standstill.silence.prefill_bytes_per_second == 500.0
    for prompt_bytes, seconds in ((3_000, 10), (100, 1_000)):
        other = listening.standstill.listen(prompt_bytes)
        listening.now += seconds
        other.heard()
        other.close()
    assert listening.standstill.silence.prefill_bytes_per_second == 300.0, "the slowest; short prompts say little"


def test_time_in_which_nobody_was_there_to_hear_is_taken_off_and_no_more():
    listening = Listening()
    ear = listening.standstill.listen()
    listening.now += 100
    listening.standstill.excuse(90)
    assert listening.silent_seconds() == 10
    listening.standstill.excuse(90)
    assert listening.silent_seconds() == 0
    listening.now += 100
    ear.close()
    listening.standstill.excuse(90)
    listening.standstill.listen()
    assert listening.silent_seconds() == 10


def test_an_agent_that_stands_still_now_and_then_still_finds_a_silence():
    """As on a machine that swaps: each stop is taken off, and what was before it counts on."""
    clock, ended = MovedClock(), []
    watches = EngineWatches(clock.monotonic_seconds)
    watches.listen(StartAttempt(AttemptId("a1"), REPLICA, Endpoint.COMPLETIONS, b"", stream=True, window_bytes=1)).heard()
    replicas = SimpleNamespace(statuses=tuple, end_hung=lambda replica_id, _: ended.append((replica_id, clock.now_seconds)))
    watchdog = Watchdog(attempts=SimpleNamespace(watches=watches), replicas=replicas, clock=clock)
    began_at_seconds = clock.now_seconds
    while not ended and clock.now_seconds < began_at_seconds + 60:
        for _ in range(round(10 / LOOK_SECONDS)):
            clock.now_seconds += LOOK_SECONDS
            watchdog.look()
        clock.now_seconds += ABSENCE_SECONDS_MIN + 0.1
        watchdog.look()
    (replica_id, at_seconds), *_ = ended
    assert replica_id == REPLICA
    assert SILENCE_SECONDS_MAX < at_seconds - began_at_seconds < SILENCE_SECONDS_MAX + 3 * ABSENCE_SECONDS_MIN
