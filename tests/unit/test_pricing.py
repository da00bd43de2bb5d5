"""What a request costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.catalogue import CatalogueEntry
from potluck_coordinator.domain.pricing import TEMPLATE_TOKENS_ALLOWANCE, believable, charge, charge_for_relayed, fee, hold_amount
from potluck_protocol.values import Endpoint, ModelFile, ModelId, Usage

ENTRY = CatalogueEntry(
    model_id=ModelId("small"),
    file=ModelFile(ModelId("small"), "path:/models", "small.gguf", "00", 1),
    engine_kinds=("scripted",),
    context_length_tokens=2048,
    slot_count=4,
    prompt_price_micro_credits=1,
    completion_price_micro_credits=4,
    licence="Apache-2.0",
    endpoints=(Endpoint.CHAT_COMPLETIONS,),
    created_at_unix_seconds=0,
)


@pytest.mark.parametrize(
    ("prompt_bytes", "completion_tokens_max", "answer_count", "expected"),
    [
        (0, 0, 1, TEMPLATE_TOKENS_ALLOWANCE),
        (100, 10, 1, 100 + TEMPLATE_TOKENS_ALLOWANCE + 10 * 4),
        (100, 10, 3, 100 + TEMPLATE_TOKENS_ALLOWANCE + 30 * 4),
        (10**9, 10**9, 1, 2048 + 2048 * 4),
        (10**9, None, 2, 2048 + 2 * 2048 * 4),
        (-5, -5, 0, TEMPLATE_TOKENS_ALLOWANCE),
    ],
)
def test_hold_amount(prompt_bytes, completion_tokens_max, answer_count, expected):
    assert hold_amount(ENTRY, prompt_bytes, completion_tokens_max, answer_count, 1) == expected


@given(
    prompt_bytes=st.integers(0, 5000),
    wanted=st.none() | st.integers(0, 5000),
    answer_count=st.integers(1, 4),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_request_within_its_limits_never_costs_more_than_its_hold(prompt_bytes, wanted, answer_count, shares):
    context = ENTRY.context_length_tokens
    prompt_tokens = int(shares[0] * min(prompt_bytes + TEMPLATE_TOKENS_ALLOWANCE, context))
    completion_tokens = int(shares[1] * min(context if wanted is None else wanted, context)) * answer_count
    held = hold_amount(ENTRY, prompt_bytes, wanted, answer_count, 1)
    assert 0 <= charge_for_relayed(ENTRY, completion_tokens) <= charge(ENTRY, Usage(prompt_tokens, completion_tokens)) <= held


@pytest.mark.parametrize(
    ("prompt_bytes", "prompt_count", "expected"),
    [(10_000, 1, 2048), (10_000, 3, 3 * 2048), (10_000, 32, 10_000 + TEMPLATE_TOKENS_ALLOWANCE), (10_000, 0, 2048)],
)
def test_each_of_several_prompts_may_fill_the_context(prompt_bytes, prompt_count, expected):
    assert hold_amount(ENTRY, prompt_bytes, 0, 1, prompt_count) == expected


def test_counts_below_zero_pay_nothing():
    assert charge(ENTRY, Usage(-1, -(2**63))) == 0
    assert charge_for_relayed(ENTRY, -7) == 0
    assert charge(ENTRY, Usage(10, -3)) == 10


@pytest.mark.parametrize(
    ("amount", "basis_points", "expected"), [(0, 500, 0), (19, 500, 0), (20, 500, 1), (39, 500, 1), (7, 0, 0), (7, 10_000, 7)]
)
def test_fee_is_rounded_in_the_payees_favour(amount, basis_points, expected):
    assert fee(amount, basis_points) == expected


@pytest.mark.parametrize("basis_points", [-1, 10_001])
def test_fee_refuses_a_rate_that_is_none(basis_points):
    with pytest.raises(ValueError, match="fee_basis_points"):
        fee(10, basis_points)


COUNTS = st.integers(-(2**60), 2**60)


@given(usage=st.builds(Usage, COUNTS, COUNTS, COUNTS), prompt_tokens_max=COUNTS, completion_tokens_max=COUNTS)
def test_what_is_believed_is_never_more_than_can_have_been_nor_than_was_said(usage, prompt_tokens_max, completion_tokens_max):
    believed = believable(usage, prompt_tokens_max, completion_tokens_max)
    assert 0 <= believed.prompt_token_count <= max(0, prompt_tokens_max) + TEMPLATE_TOKENS_ALLOWANCE
    assert 0 <= believed.completion_token_count <= max(0, completion_tokens_max)
    assert 0 <= believed.cached_prompt_token_count <= believed.prompt_token_count <= max(0, usage.prompt_token_count)
    assert believed.completion_token_count <= max(0, usage.completion_token_count)
    assert believable(believed, prompt_tokens_max, completion_tokens_max) == believed


def test_an_honest_count_is_believed():
    assert believable(Usage(120, 40, 64), 300, 60) == Usage(120, 40, 64)
