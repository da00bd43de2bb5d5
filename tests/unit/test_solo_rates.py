"""How fast an engine is for one client, by answers that had it to themselves, and which answers those are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.solo_rates import (
    ANSWERS_MIN,
    DECODE_TOKENS_MIN,
    PREFILL_TOKENS_MIN,
    STEADY_SHARE,
    Rate,
    SoloAnswer,
    SoloRates,
    after,
    decode_rate,
    prefill_rate,
)
from potluck_node.solo_answers import TAIL_BYTES, SoloAnswers, Stopwatch
from potluck_protocol.values import AttemptId, Endpoint, ReplicaId, StartAttempt

ANSWER = SoloAnswer(prompt_tokens=2048, cached_tokens=0, completion_tokens=101, first_token_seconds=2.0, further_tokens_seconds=4.0)
REPLICA = ReplicaId("n/m")
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def usage(prompt: int = 1000, completion: int = 101, details: bytes = b'{"cached_tokens":200}') -> bytes:
    counts = b'{"prompt_tokens":%d,"completion_tokens":%d,"prompt_tokens_details":%s}' % (prompt, completion, details)
    return b'data: {"choices":[],"usage":' + counts + b"}\n\n"


@pytest.mark.parametrize(
    ("answer", "prefill", "decode"),
    [
        (ANSWER, Rate(1024.0, 1024.0), Rate(25.0, 2098.5)),
        (replace(ANSWER, cached_tokens=1024), Rate(512.0, 1536.0), Rate(25.0, 2098.5)),
        (replace(ANSWER, cached_tokens=2048 - PREFILL_TOKENS_MIN + 1), None, Rate(25.0, 2098.5)),
        (replace(ANSWER, completion_tokens=DECODE_TOKENS_MIN - 1), Rate(1024.0, 1024.0), None),
        (replace(ANSWER, first_token_seconds=0.0, further_tokens_seconds=0.0), None, None),
        (replace(ANSWER, cached_tokens=-1), None, Rate(25.0, 2098.5)),
        (replace(ANSWER, prompt_tokens=-1), None, None),
    ],
)
def test_what_one_answer_shows(answer, prefill, decode):
    assert (prefill_rate(answer), decode_rate(answer)) == (prefill, decode)


def test_a_rate_is_told_once_enough_answers_have_shown_it_and_anew_when_it_has_moved():
    rates = SoloRates()
    for number in range(ANSWERS_MIN):
        assert rates.decode is None or rates.decode.told is None, number
        rates = after(rates, ANSWER)
    assert rates.decode.told == Rate(25.0, 2098.5)
    a_little_faster = replace(ANSWER, further_tokens_seconds=100 / (25.0 * (1 + STEADY_SHARE / 2)))
    for _ in range(20):
        rates = after(rates, a_little_faster)
    assert rates.decode.told.tokens_per_second == 25.0
    for _ in range(20):
        rates = after(rates, replace(ANSWER, further_tokens_seconds=2.0))
    assert rates.decode.told.tokens_per_second == pytest.approx(50.0, rel=STEADY_SHARE)
    assert rates.prefill.told == Rate(1024.0, 1024.0)


answers = st.builds(
    SoloAnswer,
    prompt_tokens=st.integers(-10, 10**6),
    cached_tokens=st.integers(-10, 10**6),
    completion_tokens=st.integers(-10, 10**6),
    first_token_seconds=st.floats(-1, 1e6),
    further_tokens_seconds=st.floats(-1, 1e6),
)


@given(st.lists(answers, max_size=8))
def test_whatever_an_engine_counts_its_rates_lie_between_those_of_its_answers(shown):
    rates = SoloRates()
    for answer in shown:
        rates = after(rates, answer)
    for average, each in ((rates.prefill, map(prefill_rate, shown)), (rates.decode, map(decode_rate, shown))):
        seen = [rate for rate in each if rate is not None]
        assert (average is None) == (not seen)
        if average is not None:
            assert (average.told is None) == (len(seen) < ANSWERS_MIN)
            slowest, fastest = (choose(rate.tokens_per_second for rate in seen) for choose in (min, max))
            assert slowest * (1 - 1e-9) <= average.smoothed.tokens_per_second <= fastest * (1 + 1e-9)


class Timed:
    """A node's solo answers by a clock that is moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self.solo = SoloAnswers(lambda: self.now)

    def start(
        self, body: bytes = b'{"stream":true}', *, stream: bool = True, endpoint: Endpoint = Endpoint.CHAT_COMPLETIONS
    ) -> StartAttempt:
        return StartAttempt(AttemptId("a"), REPLICA, endpoint, body, stream=stream, window_bytes=1 << 20)

    def say(self, stopwatch: Stopwatch, after_seconds: float, data: bytes, *, held_up: bool = False) -> None:
        self.now += after_seconds
        stopwatch.take(data, held_up=held_up)

    def answer(self, stopwatch: Stopwatch, end: bytes) -> SoloAnswer | None:
        """The role at once, the first token after two seconds, the last one four seconds later."""
        self.say(stopwatch, 0.5, ROLE)
        self.say(stopwatch, 1.5, TOKEN)
        self.say(stopwatch, 4.0, TOKEN + end)
        return stopwatch.answer()


SEEN = SoloAnswer(prompt_tokens=1000, cached_tokens=200, completion_tokens=101, first_token_seconds=2.0, further_tokens_seconds=4.0)


def test_a_chats_first_event_is_no_token():
    timed = Timed()
    assert timed.answer(timed.solo.begin(timed.start(), alone=True), usage() + DONE) == SEEN


def test_a_role_and_a_token_that_come_together_are_a_token():
    timed = Timed()
    stopwatch = timed.solo.begin(timed.start(), alone=True)
    timed.say(stopwatch, 2.0, ROLE + TOKEN)
    timed.say(stopwatch, 4.0, TOKEN + usage() + DONE)
    assert stopwatch.answer() == SEEN


def test_what_keeps_a_silent_stream_alive_is_no_token_and_takes_no_time():
    timed = Timed()
    stopwatch = timed.solo.begin(timed.start(), alone=True)
    for data, after_seconds in ((b": data: no\n\n", 0.5), (ROLE, 0.5), (b":\n\n", 0.5), (TOKEN, 0.5), (TOKEN + usage() + DONE, 4.0)):
        timed.say(stopwatch, after_seconds, data)
    timed.say(stopwatch, 30.0, b":\n\n")
    assert stopwatch.answer() == SEEN


def test_a_completions_first_event_is_a_token():
    timed = Timed()
    stopwatch = timed.solo.begin(timed.start(endpoint=Endpoint.COMPLETIONS), alone=True)
    timed.say(stopwatch, 2.0, TOKEN)
    timed.say(stopwatch, 4.0, usage() + DONE)
    assert stopwatch.answer() == SEEN


@pytest.mark.parametrize(
    ("end", "cached_tokens"),
    [
        (usage(details=b"null"), 0),
        (usage(details=b"{}"), 0),
        (usage(details=b'{"cached_tokens":null}'), 0),
        (usage().replace(b"data: ", b"data:"), 200),
    ],
)
def test_an_engine_that_does_not_speak_of_remembered_tokens_had_none(end, cached_tokens):
    timed = Timed()
    assert timed.answer(timed.solo.begin(timed.start(), alone=True), end + DONE).cached_tokens == cached_tokens


@pytest.mark.parametrize(
    "end",
    [
        b"",
        b'data: {"usage"\n\n',
        b'data: {"usage":[1]}\n\n',
        b'data: ["usage"]\n\n',
        b'data: {"usage":{"prompt_tokens":"many","completion_tokens":1}}\n\n',
        usage() + b"x" * TAIL_BYTES,
    ],
)
def test_without_a_record_at_the_end_nothing_is_known(end):
    timed = Timed()
    assert timed.answer(timed.solo.begin(timed.start(), alone=True), end + DONE) is None


def test_the_record_is_found_however_the_end_is_cut_into_pieces():
    timed = Timed()
    stopwatch = timed.solo.begin(timed.start(), alone=True)
    for data in (ROLE, TOKEN * 300, TOKEN, usage(), DONE):
        timed.say(stopwatch, 1.0, data)
    assert stopwatch.answer().completion_tokens == 101


def test_only_streams_that_nobody_met_and_nobody_held_up_count():
    timed = Timed()
    assert timed.answer(timed.solo.begin(timed.start(), alone=False), usage() + DONE) is None
    assert timed.answer(timed.solo.begin(timed.start(stream=False), alone=True), usage() + DONE) is None
    met = timed.solo.begin(timed.start(), alone=True)
    second = timed.solo.begin(timed.start(), alone=False)
    assert timed.answer(met, usage() + DONE) is None
    assert timed.answer(second, usage() + DONE) is None
    slow = timed.solo.begin(timed.start(), alone=True)
    timed.say(slow, 1.0, ROLE)
    timed.say(slow, 1.0, TOKEN, held_up=True)
    assert timed.answer(slow, usage() + DONE) is None
    elsewhere = replace(timed.start(), replica_id=ReplicaId("n/other"))
    alone = timed.solo.begin(timed.start(), alone=True)
    timed.solo.begin(elsewhere, alone=True)
    assert timed.answer(alone, usage() + DONE) == SEEN


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        (b'{"messages":[]}', True),
        (b'{"n": 1, "messages":[]}', True),
        (b'{"messages":[],"n":null}', True),
        (b'{"messages":[{"content":"say \\"n\\": 5"}]}', True),
        (b'{"n":2,"messages":[]}', False),
        (b'{"n" : 10}', False),
        (b'{"best_of":3}', False),
        (b'{"prompt":"one"}', True),
        (b'{"prompt": ["one","two"]}', False),
    ],
)
def test_several_choices_are_not_one_stream(body, counts):
    timed = Timed()
    for _ in range(ANSWERS_MIN):
        stopwatch = timed.solo.begin(timed.start(body), alone=True)
        assert timed.answer(stopwatch, usage() + DONE) == SEEN
        timed.solo.end(timed.start(body), stopwatch)
    decode = timed.solo.rates(REPLICA).decode
    assert (decode is not None and decode.told is not None) == counts
    timed.solo.forget(REPLICA)
    assert timed.solo.rates(REPLICA) == SoloRates()
