"""What answers that their clients cut short teach of how long answers are: nothing, but where they are longer than what was expected."""

from __future__ import annotations

import pytest

from potluck_coordinator.domain.expectation import OWN_ANSWERS_MIN, TOKENS_GUESS, AnswerExpectation, teaches
from potluck_coordinator.gateway.expectations import Expectations
from potluck_protocol.values import AccountId, Usage
from tests.support.replicas import MODEL
from tests.support.request_path import request_by

CONTEXT_TOKENS = 8192
PRESENT = AnswerExpectation(100.0, 300.0)


@pytest.mark.parametrize(
    ("tokens", "tokens_max", "does"),
    [
        (16, 16, False),
        (100, 100, False),
        (101, 101, True),
        (16, 17, True),  # it ended by itself
        (16, None, True),
        (0, 0, True),  # an embedding
    ],
)
def test_an_answer_that_was_cut_says_only_that_answers_are_longer(tokens, tokens_max, does):
    assert teaches(tokens, tokens_max, PRESENT) is does


def answered(expectations, tokens, tokens_max, count, account="ann"):
    request = request_by(AccountId(account), model_id=MODEL, completion_tokens_max=tokens_max)
    for _ in range(count):
        expectations.learn(request, Usage(20, tokens), tokens_max or CONTEXT_TOKENS)


def foreseen(expectations, account, tokens_max=None):
    return expectations.work(request_by(AccountId(account), model_id=MODEL, completion_tokens_max=tokens_max)).answer_tokens


def test_whoever_cuts_answers_short_makes_nobody_believe_that_they_are():
    expectations = Expectations()
    answered(expectations, 1, 1, 200)
    assert foreseen(expectations, "ann") == foreseen(expectations, "bob") == pytest.approx(TOKENS_GUESS)
    assert foreseen(expectations, "ann", 16) == 16
    assert expectations.usual(MODEL).answer_tokens == TOKENS_GUESS
    answered(expectations, 10, 1000, int(2 * OWN_ANSWERS_MIN))
    assert foreseen(expectations, "ann") < 20, "those that ended by themselves were short"


def test_answers_cut_above_what_is_expected_are_learned_from():
    expectations = Expectations()
    answered(expectations, 2000, 2000, 40)
    assert foreseen(expectations, "ann") == pytest.approx(2000)
    assert foreseen(expectations, "bob") > 1000
    assert expectations.usual(MODEL).answer_tokens > 1000
