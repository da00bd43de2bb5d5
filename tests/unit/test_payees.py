"""Shares of a payment: nothing is lost to rounding, nobody is named twice."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.ledger import AMOUNT_MICRO_CREDITS_MAX
from potluck_coordinator.domain.payees import WEIGHT_SUM_MAX, PayeeShare, merged, split
from potluck_protocol.values import AccountId

amounts = st.integers(0, AMOUNT_MICRO_CREDITS_MAX)
weight_lists = st.lists(st.one_of(st.integers(1, 9), st.integers(1, WEIGHT_SUM_MAX)), min_size=1, max_size=12)
share_lists = st.lists(st.builds(PayeeShare, st.sampled_from("abcd"), st.integers(1, 10**12)), min_size=1, max_size=12)


def share(account_id, weight=1):
    return PayeeShare(AccountId(account_id), weight)


@pytest.mark.parametrize(
    ("amount", "weights", "expected"),
    [
        (0, (1, 2), (0, 0)),
        (57, (1,), (57,)),
        (57, (2, 1), (38, 19)),
        (1, (1, 1), (1, 0)),
        (1, (1, 2), (0, 1)),
        (2, (1, 1, 1), (1, 1, 0)),
        (10, (1, 1, 1), (4, 3, 3)),
        (10, (3, 3, 1), (4, 4, 2)),
        (5, (98, 1, 1), (5, 0, 0)),
        (100, (4, 22, 6), (12, 69, 19)),
        (AMOUNT_MICRO_CREDITS_MAX, (WEIGHT_SUM_MAX - 1, 1), (AMOUNT_MICRO_CREDITS_MAX - 1, 1)),
    ],
)
def test_split(amount, weights, expected):
    assert split(amount, weights) == expected


@given(amount=amounts, weights=weight_lists)
def test_parts_sum_to_the_amount_and_each_is_within_one_of_its_proportion(amount, weights):
    parts = split(amount, weights)
    assert len(parts) == len(weights)
    assert sum(parts) == amount
    total = sum(weights)
    assert all(abs(part - Fraction(amount * weight, total)) < 1 for part, weight in zip(parts, weights, strict=True))
    assert split(amount, weights) == parts


@given(amount=amounts, weights=weight_lists)
def test_nobody_with_less_weight_gets_more(amount, weights):
    parts = split(amount, weights)
    assert [part for _, part in sorted(zip(weights, parts, strict=True))] == sorted(parts)


@given(amount=amounts, weights=weight_lists, factor=st.integers(1, 1000))
def test_only_proportions_count(amount, weights, factor):
    assert split(amount, [weight * factor for weight in weights]) == split(amount, weights)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([share("bob")], (share("bob"),)),
        ([share("bob", 7)], (share("bob"),)),
        ([share("bob", 3), share("bob", 4)], (share("bob"),)),
        ([share("cat", 2), share("bob", 3)], (share("bob", 3), share("cat", 2))),
        ([share("cat", 2), share("bob", 4)], (share("bob", 2), share("cat", 1))),
        ([share("cat", 2), share("bob", 3), share("cat", 1)], (share("bob"), share("cat"))),
    ],
)
def test_shares_are_written_in_one_way(shares, expected):
    assert merged(shares) == expected


@given(shares=share_lists, seed=st.integers(0, 9))
def test_merging_keeps_proportions_whatever_the_order(shares, seed):
    once = merged(shares)
    assert merged(once) == once
    assert merged(random.Random(seed).sample(shares, len(shares))) == once
    total, merged_total = sum(share.weight for share in shares), sum(share.weight for share in once)
    for account_id in {share.account_id for share in shares}:
        weight = sum(share.weight for share in shares if share.account_id == account_id)
        (one,) = (share for share in once if share.account_id == account_id)
        assert Fraction(one.weight, merged_total) == Fraction(weight, total)


@pytest.mark.parametrize("weight", [0, -1, WEIGHT_SUM_MAX + 1])
def test_a_weight_out_of_bounds_is_none(weight):
    with pytest.raises(ValueError, match="a weight is from 1"):
        share("bob", weight)


@pytest.mark.parametrize("shares", [[], [share("bob", WEIGHT_SUM_MAX), share("cat")]])
def test_nobody_and_weights_beyond_the_bound_cannot_be_paid(shares):
    with pytest.raises(ValueError, match="payees whose weights"):
        merged(shares)
