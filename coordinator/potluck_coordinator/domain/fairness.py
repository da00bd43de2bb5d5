"""Whose waiting request comes next, and who gives way when too many wait.

Decides by service: every account has a counter of the tokens it was given of a model, and of the accounts that wait the one with the least
comes next. So an account that floods the queue waits behind its own requests, and one that asks now and then hardly waits. An account that
begins to wait is lifted to where the others are: time in which it asked for nothing is no credit. This is the Virtual Token Counter of
Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), in its variant that charges an answer in advance, by what is
expected, and corrects that at its end, and with weights: whoever's nodes earned lately is charged less for a token, down to a quarter, so
that nobody starves. It must not know queues or nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.admission import Queued
from potluck_protocol.money import MICRO_CREDITS_PER_CREDIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from potluck_protocol.values import AccountId

PROMPT_WEIGHT: Final = 1.0
COMPLETION_WEIGHT: Final = 2.0
"""A token that is answered takes an engine longer than one that is read; the paper's weights."""
BYTES_PER_TOKEN: Final = 4
"""Of a request's body, in the mean: what is charged for a prompt whose engine never counted it."""
WEIGHT_MAX: Final = 4.0
"""Of the account that gives most; a guest's is 1, so that he gets a fifth of what the two get together, and never nothing."""
EARNED_FOR_FULL_WEIGHT_MICRO_CREDITS: Final = 100 * MICRO_CREDITS_PER_CREDIT
"""Within `EARNED_DAYS`: what a card earns by eleven tokens a second, day and night, at 15 micro-credits each."""
EARNED_DAYS: Final = 7


def service(prompt_tokens: float, completion_tokens: float) -> float:
    """What is charged for so many tokens; counts below zero, which only a lying node sends, are none."""
    return PROMPT_WEIGHT * max(0.0, prompt_tokens) + COMPLETION_WEIGHT * max(0.0, completion_tokens)


def weight_of(earned_micro_credits: int) -> float:
    """An account's, by what its nodes earned within `EARNED_DAYS`: it grows evenly from 1 to `WEIGHT_MAX`."""
    share = min(1.0, max(0, earned_micro_credits) / EARNED_FOR_FULL_WEIGHT_MICRO_CREDITS)
    return 1.0 + (WEIGHT_MAX - 1.0) * share


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


@dataclass(frozen=True, slots=True)
class Backlog:
    """One account's requests that wait."""

    counter: float
    """What it was given and charged, over its weight."""
    weight: float
    service: float
    """Expected of all that wait."""
    work: Queued


def work_ahead(others: Iterable[Backlog], own: Backlog) -> Queued:
    """What comes before one more request of an account: its own that wait, and of the others' what is served until they had as much."""
    ahead = own.work
    reaches = own.counter + own.service / own.weight
    for other in others:
        if other.service <= 0:
            continue
        part = min(1.0, max(0.0, (reaches - other.counter) * other.weight / other.service))
        ahead += Queued(part * other.work.count, part * other.work.tokens)
    return ahead


def turn_order(counters: Mapping[AccountId, float], steps: Mapping[AccountId, Sequence[float]]) -> list[tuple[AccountId, int]]:
    """In which order those that wait will be served if nobody else comes: each account and the number of its request, by whole turns.

    Args:
        counters: of each account, over its weight.
        steps: by how much each of its waiting requests will raise that, in the order of their coming.
    """
    heads = [(counters[account_id], number, account_id, 0) for number, account_id in enumerate(steps) if steps[account_id]]
    heapify(heads)
    order: list[tuple[AccountId, int]] = []
    while heads:
        counter, number, account_id, index = heads[0]
        order.append((account_id, index))
        if index + 1 == len(steps[account_id]):
            heappop(heads)
        else:
            heapreplace(heads, (counter + steps[account_id][index], number, account_id, index + 1))
    return order
