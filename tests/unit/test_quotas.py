"""What of a key's day is set aside for a request that runs, when one has room beside others, and what a refused one is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.pricing import most_tokens
from potluck_coordinator.domain.quotas import (
    DAY_MS,
    NO_USE,
    Claim,
    KeyDay,
    KeyQuotas,
    KeyUse,
    begun,
    claim,
    ended,
    marked,
    refusal,
    set_aside,
    today,
)
from potluck_coordinator.gateway.expectations import Expectations
from potluck_coordinator.gateway.gate import Gate, TierLimits
from potluck_coordinator.gateway.inference_request import Caller
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import Endpoint, KeyPrefix, Usage
from tests.support.engines import MovedClock
from tests.support.replicas import MODEL, catalogue_entry
from tests.support.request_path import request_by

NOON_MS = 10 * DAY_MS + DAY_MS // 2
ENTRY = catalogue_entry("tiny")
PER_DAY = KeyQuotas(tokens_per_day=600)


def test_a_request_claims_what_its_client_allows_and_without_that_the_context():
    bounded = claim(ENTRY, most_tokens(ENTRY, 100, 500, 2, 1), 25.0, None)
    assert bounded == Claim(100 + 256 + 1000, 100 + 256 + 4 * 1000, 25 + 1000, 25 + 4 * 1000)
    unbounded = claim(ENTRY, most_tokens(ENTRY, 100, None, 1, 1), 25.0, 300.0)
    assert unbounded == Claim(100 + 256 + 2048, 100 + 256 + 4 * 2048, 25 + 300, 25 + 4 * 300)
    inputs = claim(ENTRY, most_tokens(ENTRY, 100, 0, 1, 1), 25.0, None)
    assert (inputs.tokens, inputs.less) == (25.0, "a shorter input")


@pytest.mark.parametrize(
    ("use", "claimed", "seconds", "words"),
    [
        (KeyUse(10), Claim(600.0, 0, 500.0), 0, None),
        (KeyUse(10, running_count=2, pending_tokens=300.0), Claim(300.0, 0, 200.0), 0, None),
        (
            KeyUse(10, running_count=2, pending_tokens=574.0),
            Claim(287.0, 0, 287.0),
            1.0,
            "has used 0, what is running may take 574, and this request up to 287; wait for that to end, or ask with a smaller",
        ),
        (KeyUse(10, token_count=100.0), Claim(9000.0, 0, 400.0), 0, None),  # alone: what is expected of it decides
        (KeyUse(10, token_count=100.0, running_count=1, pending_tokens=1.0), Claim(9000.0, 0, 400.0), 1.0, "wait for that to end"),
        (KeyUse(10, token_count=500.0), Claim(300.0, 0, 287.0), 12 * 3600, "in 12 h 0 min. Until then it has 100 left: ask with a smaller"),
        (
            KeyUse(10, token_count=700.0),
            Claim(300.0, 0, 287.0),
            12 * 3600,
            "may take 287 more; it begins anew at midnight UTC",
        ),
        (KeyUse(10, token_count=700.0), Claim(900.0, 0, 800.0), None, "may take 800: there is room for it on no day. Ask with a smaller"),
    ],
)
def test_what_stands_in_a_requests_way_and_when_it_will_not(use, claimed, seconds, words):
    found = refusal(PER_DAY, use, claimed, NOON_MS)
    if words is None:
        assert found is None
    else:
        assert (words in found.words, found.retry_after_seconds) == (True, seconds), found.words


def test_of_several_reasons_the_client_is_told_the_one_that_lasts_longest():
    use = KeyUse(10, token_count=500.0, running_count=1, pending_tokens=90.0)
    both = KeyQuotas(tokens_per_day=600, concurrent_max=1, spend_micro_credits_per_day=1_000)
    assert "spend 0.001 credits a day" in refusal(both, use, Claim(50.0, 2_000, 50.0, 2_000), NOON_MS).words
    assert refusal(both, use, Claim(150.0, 10, 150.0, 10), NOON_MS).retry_after_seconds == 12 * 3600
    assert "at a time" in refusal(both, use, Claim(5.0, 10, 5.0, 10), NOON_MS).words


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(1, 400), st.floats(0, 1), st.floats(0, 1)), max_size=60))
def test_however_requests_come_a_key_ends_above_its_bound_by_one_answer_at_most(steps):
    """Whatever was expected of them, which is never what they come to here."""
    use, running, longest = KeyUse(10), [], 0.0
    for what, most, expected_share, came_share in steps:
        if what:
            if refusal(PER_DAY, use, Claim(most, 0, most * expected_share), NOON_MS) is None:
                use, longest = begun(use, most, 0), max(longest, most)
                running.append((most, most * came_share))
        elif running:
            claimed, came_to = running.pop(0)
            use = ended(use, claimed, 0, came_to, 0)
        assert use.token_count <= 600 + longest
    for claimed, came_to in running:
        use = ended(use, claimed, 0, came_to, 0)
    assert use.token_count <= 600 + longest


@given(st.lists(st.integers(0, 700), max_size=5), st.floats(0, 500))
def test_what_is_counted_while_a_request_runs_is_counted_once(marks, came_to):
    """Nodes may relay more than was asked for; then no more is given back than was set aside."""
    claimed, other = Claim(500.0, 2_000), Claim(100.0, 400)
    use = begun(begun(KeyUse(10), claimed.tokens_max, claimed.micro_credits_max), other.tokens_max, other.micro_credits_max)
    told = NO_USE
    for tokens in marks:
        before, told = told, KeyDay(0, float(tokens), 4 * tokens)
        use = marked(use, claimed, before, told)
        assert use.token_count == tokens
        assert use.pending_tokens == 100 + max(0, 500 - tokens)
        assert use.pending_micro_credits == 400 + max(0, 2_000 - 4 * tokens)
    use = ended(use, *set_aside(claimed, told), came_to - told.token_count, 7 - told.spend_micro_credits)
    assert (use.token_count, use.spend_micro_credits) == (pytest.approx(came_to), 7)
    assert (use.running_count, use.pending_tokens, use.pending_micro_credits) == (1, 100.0, 400)


def test_what_was_counted_before_midnight_is_no_use_of_the_next_day():
    claimed, told = Claim(500.0, 2_000), KeyDay(0, 300.0, 1_200)
    use = today(marked(begun(KeyUse(10), 500.0, 2_000), claimed, NO_USE, told), NOON_MS + DAY_MS)
    assert (use.token_count, use.pending_tokens) == (0.0, 200.0)
    assert ended(use, *set_aside(claimed, told), 310.0 - 300.0, 40).token_count == 10.0
    assert ended(use, *set_aside(claimed, told), 290.0 - 300.0, -40) == KeyUse(11), "and never less than nothing"


def asking(**quotas):
    caller = Caller(KeyPrefix("key"), KeyQuotas(**quotas))
    return replace(request_by(model_id=MODEL, completion_tokens_max=500), caller=caller)


def gate_of() -> Gate:
    return Gate(TierLimits(), frozenset, Expectations(), MovedClock())


def test_what_no_day_has_room_for_is_refused_for_good_with_the_field_that_would_mend_it():
    gate = gate_of()
    with pytest.raises(PotluckError, match="on no day") as refused:
        gate.enter(asking(tokens_per_day=400), ENTRY)
    error = refused.value
    assert (error.code, error.param, error.retry_after_seconds) == (ErrorCode.INVALID_REQUEST, "max_tokens", None)
    long_input = replace(
        asking(tokens_per_day=400), endpoint=Endpoint.EMBEDDINGS, completion_tokens_max=0, prompt_bytes=5_000, prompt_count=8
    )
    with pytest.raises(PotluckError, match="a shorter input") as refused:
        gate.enter(long_input, ENTRY)
    assert refused.value.param == "input"


def test_what_runs_is_set_aside_of_tokens_and_credits_until_it_is_over():
    gate = gate_of()
    asked = asking(tokens_per_day=1_000, spend_micro_credits_per_day=10**9)
    visit = gate.enter(asked, ENTRY)
    with pytest.raises(PotluckError, match="what is running may take 776") as refused:
        gate.enter(asked, ENTRY)
    assert (refused.value.code, refused.value.retry_after_seconds) == (ErrorCode.QUOTA_EXCEEDED, 1.0)
    visit.end(Usage(10, 20), 20, 90, 1.0, waited_seconds=2.0)
    gate.enter(asked, ENTRY).take_back()
    (use,) = gate._uses.values()
    assert (use.token_count, use.spend_micro_credits, use.pending_tokens, use.pending_micro_credits) == (30.0, 90, 0.0, 0)
