"""What becomes of a request that names an idempotency key, by what is known of the key."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.idempotency import (
    IN_FLIGHT_RETRY_SECONDS,
    KEY_KEPT_MS,
    LINGER_SECONDS,
    Kept,
    KeptBounds,
    KeyRecord,
    KeyState,
    KeyUse,
    Standing,
    WhenGone,
    as_known_now,
    has_claimed,
    has_spent,
    is_too_much,
    linger_seconds,
    not_kept,
    other_request,
    standing,
)
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.idempotency_keys import checked_key
from potluck_protocol.values import AccountId, RequestId

USE = KeyUse(AccountId("ann"), b"k", b"body", RequestId("first"), "claim-1", gateway_epoch=3)
AGAIN = replace(USE, request_id=RequestId("second"), claim_id="claim-2")
RECORD = KeyRecord(USE, KeyState.SPENT, 1234, claimed_at_unix_ms=1000)


@pytest.mark.parametrize(
    ("record", "use", "now_ms", "expected"),
    [
        (None, AGAIN, 0, Standing.FREE),
        (RECORD, AGAIN, 1000, Standing.SAME),
        (RECORD, AGAIN, 1000 + KEY_KEPT_MS - 1, Standing.SAME),
        (RECORD, AGAIN, 1000 + KEY_KEPT_MS, Standing.FREE),
        (RECORD, replace(AGAIN, body_hash=b"other"), 1000, Standing.OTHER),
        (RECORD, replace(AGAIN, body_hash=b"other"), 1000 + KEY_KEPT_MS, Standing.FREE),
        (replace(RECORD, state=KeyState.CLAIMED), AGAIN, 1000, Standing.SAME),
        # A clock that was set back makes no key free.
        (RECORD, AGAIN, 0, Standing.SAME),
    ],
)
def test_a_key_is_free_the_same_or_anothers(record, use, now_ms, expected) -> None:
    assert standing(record, use, now_ms) is expected


def test_a_claim_told_twice_is_one_and_a_second_request_of_the_same_id_is_another() -> None:
    claimed = replace(RECORD, state=KeyState.CLAIMED)
    assert has_claimed(claimed, USE)
    assert not has_claimed(claimed, replace(USE, claim_id="claim-2")), "clients choose request ids, and may choose one twice"
    assert not has_claimed(RECORD, USE)
    assert not has_claimed(None, USE)


@pytest.mark.parametrize(("size", "charge", "expected"), [(0, 0, False), (1, 0, True), (0, 1, True), (5, 5, True)])
def test_a_key_is_spent_by_what_was_seen_or_paid(size, charge, expected) -> None:
    assert has_spent(answer_bytes=size, charge_micro_credits=charge) is expected


@pytest.mark.parametrize("key", ["k", "a" * 255, "order 17/b", "~!"])
def test_good_keys(key) -> None:
    assert checked_key(key) == key


@pytest.mark.parametrize("key", ["", "a" * 256, "tab\there", "new\nline", "schl\u00fcssel", "\x7f"])
def test_what_is_no_key(key) -> None:
    with pytest.raises(PotluckError) as refused:
        checked_key(key)
    assert (refused.value.code, refused.value.param) == (ErrorCode.INVALID_REQUEST, "Idempotency-Key")
    assert key == "" or key not in refused.value.message


def test_every_refusal_names_the_first_request_and_the_way_out() -> None:
    spent = not_kept(RECORD, 3)
    assert (spent.code, spent.spec.http_status) == (ErrorCode.IDEMPOTENCY_KEY_SPENT, 409)
    assert "1234 micro-credits as request first" in spent.message
    assert "another idempotency key" in spent.message

    claimed = replace(RECORD, state=KeyState.CLAIMED)
    interrupted = not_kept(as_known_now(claimed, {4}), 4)
    assert interrupted.code is ErrorCode.IDEMPOTENCY_KEY_SPENT
    assert "begun as request first" in interrupted.message

    elsewhere = not_kept(as_known_now(claimed, {3, 4}), 4)
    assert (elsewhere.code, elsewhere.retry_after_seconds) == (ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT, IN_FLIGHT_RETRY_SECONDS)
    assert "by another of the pool's gateways" in elsewhere.message

    assert as_known_now(RECORD, {4}) == RECORD, "what is spent stays so"
    in_flight = not_kept(as_known_now(claimed, {3}), 3)
    assert (in_flight.code, in_flight.spec.http_status) == (ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT, 409)
    assert in_flight.retry_after_seconds

    other = other_request(RECORD)
    assert (other.code, other.spec.http_status) == (ErrorCode.IDEMPOTENCY_KEY_REUSED, 422)


@given(account=st.tuples(st.integers(0, 20), st.integers(0, 200)), others=st.tuples(st.integers(0, 20), st.integers(0, 200)))
def test_the_oldest_goes_only_where_a_bound_is_passed(account, others) -> None:
    bounds = KeptBounds(answer_bytes_max=50, account_bytes_max=100, account_count_max=10, bytes_max=250, count_max=25)
    own, everyone = Kept(*account), Kept(account[0] + others[0], account[1] + others[1])
    assert is_too_much(own, everyone, bounds) == (own.count > 10 or own.size_bytes > 100, everyone.count > 25 or everyone.size_bytes > 250)


@pytest.mark.parametrize(
    ("when_gone", "placed", "expected"),
    [
        (WhenGone.FINISH, False, None),
        (WhenGone.FINISH, True, None),
        (WhenGone.CANCEL, False, LINGER_SECONDS),
        (WhenGone.CANCEL, True, 0.0),
    ],
)
def test_how_long_a_run_goes_on_without_a_reader(when_gone, placed, expected) -> None:
    assert linger_seconds(when_gone, placed=placed) == expected
