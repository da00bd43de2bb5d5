"""The requests that wait for a slot of one model, and what each account was given of it.

Decides nothing but order in time: whose turn it is, and who gives way, is `domain.fairness`. It must not know nodes, admission or answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace, nlargest
from itertools import count
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.fairness import BYTES_PER_TOKEN, expected_service, gives_way, lifted, service
from potluck_coordinator.domain.pricing import TEMPLATE_TOKENS_ALLOWANCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.gateway.answer import Answer
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_protocol.values import AccountId, NodeId

COMPLETION_TOKENS_GUESS: Final = 256.0
"""Of an answer by a model that has not answered yet."""
MEAN_WEIGHT: Final = 0.2
"""Of the newest answer in a model's mean."""
ACCOUNTS_REMEMBERED_MAX: Final = 1000
"""Beside those that wait or are answered; above that the least served ones are forgotten."""


class WaitingRequest:
    """One queued request."""

    __slots__ = ("entry", "excluded", "number", "request", "seconds_max", "turn")

    def __init__(self, request: InferenceRequest, entry: CatalogueEntry, excluded: frozenset[NodeId], seconds_max: float) -> None:
        self.request = request
        self.entry = entry
        self.excluded = excluded
        self.seconds_max = seconds_max
        self.turn: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.number = 0


@dataclass(slots=True)
class _Account:
    """What it was given, as far as its answers are over, and what those under way were charged in advance."""

    given: float
    pending: float = 0.0
    running_count: int = 0

    @property
    def counter(self) -> float:
        return self.given + self.pending


class ModelQueue:
    """One model's."""

    def __init__(self) -> None:
        self._queues: dict[AccountId, deque[WaitingRequest]] = {}
        self._accounts: dict[AccountId, _Account] = {}
        self._level = 0.0
        self._completion_tokens_mean = COMPLETION_TOKENS_GUESS
        self._numbers = count(1)

    def __len__(self) -> int:
        """Requests that wait; one that has its slot has just not left the queue yet."""
        return sum(not waiting.turn.done() for queue in self._queues.values() for waiting in queue)

    def join(self, waiting: WaitingRequest) -> None:
        """Behind the account's own."""
        account_id = waiting.request.account_id
        waiting.number = next(self._numbers)
        if account_id not in self._queues:
            self._lift(account_id)
            self._queues[account_id] = deque()
        self._queues[account_id].append(waiting)

    def leave(self, waiting: WaitingRequest) -> None:
        """Whatever became of it; again is harmless."""
        account_id = waiting.request.account_id
        queue = self._queues.get(account_id, deque())
        if waiting in queue:
            queue.remove(waiting)
        if not queue:
            self._queues.pop(account_id, None)

    def in_turn(self) -> Iterator[WaitingRequest]:
        """Everyone once, whoever is to come next first: who was dispatched meanwhile, and charged, comes later with his others."""
        lines = {account_id: iter(tuple(queue)) for account_id, queue in self._queues.items()}
        firsts = [first for line in lines.values() if (first := _next_of(line)) is not None]
        heads = [(self._accounts[first.request.account_id].counter, first.number, first) for first in firsts]
        heapify(heads)
        while heads:
            _, _, waiting = heads[0]
            if not waiting.turn.done():
                yield waiting
            account_id = waiting.request.account_id
            following = _next_of(lines[account_id])
            if following is None:
                heappop(heads)
            else:
                heapreplace(heads, (self._accounts[account_id].counter, following.number, following))

    def newest_to_give_way(self, newcomer: AccountId) -> WaitingRequest | None:
        """Whose place in a full queue is the newcomer's; None: nobody's."""
        waiting = {account_id: [one for one in queue if not one.turn.done()] for account_id, queue in self._queues.items()}
        account_id = gives_way({account_id: len(ones) for account_id, ones in waiting.items()}, newcomer)
        return None if account_id is None else waiting[account_id][-1]

    def charge(self, request: InferenceRequest) -> float:
        """One is dispatched, whether it has waited or not: what its account is charged in advance."""
        expected = expected_service(request.prompt_bytes, request.completion_tokens_max, self._completion_tokens_mean, request.answer_count)
        if request.account_id not in self._queues:
            self._lift(request.account_id)
        account = self._accounts[request.account_id]
        self._level = account.given
        account.pending += expected
        account.running_count += 1
        return expected

    def correct(self, request: InferenceRequest, expected: float, answer: Answer) -> None:
        """Its answer is over: the account is charged what it came to, and of its node's word for that no more than can be true."""
        # Of an answer in one piece that broke off nobody knows how far it had come.
        given = service(request.prompt_bytes / BYTES_PER_TOKEN, answer.relayed_token_count) if request.stream else expected
        if (usage := answer.usage) is not None:
            most = service(request.prompt_bytes + TEMPLATE_TOKENS_ALLOWANCE, answer.completion_tokens_max)
            given = min(service(usage.prompt_token_count, usage.completion_token_count), most)
            if answer.is_whole:
                completion_tokens = min(usage.completion_token_count, answer.completion_tokens_max) / request.answer_count
                self._completion_tokens_mean += MEAN_WEIGHT * (completion_tokens - self._completion_tokens_mean)
        account = self._accounts[request.account_id]
        account.given += given
        account.running_count -= 1
        # Sums of fractions do not come back to nothing by themselves.
        account.pending = account.pending - expected if account.running_count else 0.0

    def _lift(self, account_id: AccountId) -> None:
        if len(self._accounts) >= ACCOUNTS_REMEMBERED_MAX:
            self._forget()
        account = self._accounts.setdefault(account_id, _Account(0.0))
        # What the others were charged in advance does not lift it: it has nothing under way, and comes before their next ones.
        account.given = lifted(account.given, (self._accounts[one].given for one in self._queues), self._level)

    def _forget(self) -> None:
        """Most of those that nothing is under way for: the ones below the level would be lifted to it, so that it makes no difference."""
        engaged = {one: account for one, account in self._accounts.items() if account.running_count or one in self._queues}
        others = {one: account for one, account in self._accounts.items() if one not in engaged and account.given > self._level}
        kept = nlargest(ACCOUNTS_REMEMBERED_MAX // 2, others, key=lambda one: others[one].given)
        self._accounts = engaged | {one: others[one] for one in kept}


def _next_of(line: Iterator[WaitingRequest]) -> WaitingRequest | None:
    return next((waiting for waiting in line if not waiting.turn.done()), None)
