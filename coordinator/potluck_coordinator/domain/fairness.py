"""Whose waiting request comes next, and who gives way when too many wait.

Decides by service: every account has a counter of the tokens it was given of a model, and of the accounts that wait the one with the least
comes next. So an account that floods the queue waits behind its own requests, and one that asks now and then hardly waits. An account that
begins to wait is lifted to where the others are: time in which it asked for nothing is no credit. This is the Virtual Token Counter of
Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), in its variant that charges an answer in advance, by what is
expected, and corrects that at its end. It must not know queues, nodes or money.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from potluck_protocol.values import AccountId

PROMPT_WEIGHT: Final = 1.0
COMPLETION_WEIGHT: Final = 2.0
"""A token that is answered takes an engine longer than one that is read; the paper's weights."""
BYTES_PER_TOKEN: Final = 4
"""Of a request's body, in the mean: what is charged for a prompt before the engine has counted it."""


def service(prompt_tokens: float, completion_tokens: float) -> float:
    """What is charged for so many tokens; counts below zero, which only a lying node sends, are none."""
    return PROMPT_WEIGHT * max(0.0, prompt_tokens) + COMPLETION_WEIGHT * max(0.0, completion_tokens)


def expected_service(prompt_bytes: int, completion_tokens_max: int | None, completion_tokens_mean: float, answer_count: int) -> float:
    """What a request is charged when it is dispatched.

    Args:
        prompt_bytes: of its body.
        completion_tokens_max: as its client asked, for each answer; None: no bound.
        completion_tokens_mean: of the model's answers lately.
        answer_count: how many answers it gets.
    """
    expected = completion_tokens_mean if completion_tokens_max is None else min(completion_tokens_mean, completion_tokens_max)
    return service(prompt_bytes / BYTES_PER_TOKEN, expected * answer_count)


def lifted(given: float, waiting: Iterable[float], level: float) -> float:
    """The counter of an account that begins to wait.

    Args:
        given: what it was given until now.
        waiting: the same of those that wait already.
        level: where the account was that was served last; it counts where nobody waits.
    """
    return max(given, min(waiting, default=level))


def gives_way(queued_counts: Mapping[AccountId, int], newcomer: AccountId) -> AccountId | None:
    """Of whose requests the newest leaves a full queue for the newcomer's: the account's with most, if that makes them more equal."""
    most = max(queued_counts, key=lambda account_id: queued_counts[account_id], default=None)
    if most is None or queued_counts[most] <= queued_counts.get(newcomer, 0) + 1:
        return None
    return most
