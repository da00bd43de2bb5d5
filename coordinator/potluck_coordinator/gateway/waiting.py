"""The requests that wait for room at one model in one tier, and what each account was given of it.

Decides nothing but order in time: whose turn it is, and who gives way, is `domain.fairness`. It must not know nodes, admission or answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace, nlargest
from itertools import count
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.admission import NOBODY, Queued
from potluck_coordinator.domain.fairness import BYTES_PER_TOKEN, Backlog, gives_way, lifted, service, turn_order, work_ahead
from potluck_coordinator.domain.pricing import TEMPLATE_TOKENS_ALLOWANCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.forecast import Work
    from potluck_coordinator.gateway.appointments import Expected
    from potluck_coordinator.gateway.attempt import Attempt
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_protocol.values import AccountId, NodeId

ACCOUNTS_REMEMBERED_MAX: Final = 1000
"""Beside those that wait or are answered; above that the least served ones are forgotten."""


class WaitingRequest:
    """One queued request."""

    __slots__ = (
        "arrived_at_seconds",
        "deadline_seconds",
        "entry",
        "excluded",
        "number",
        "request",
        "seconds_max",
        "service",
        "turn",
        "work",
    )

    def __init__(
        self,
        request: InferenceRequest,
        entry: CatalogueEntry,
        excluded: frozenset[NodeId],
        *,
        work: Work,
        seconds_max: float,
        arrived_at_seconds: float,
        joined_at_seconds: float,
    ) -> None:
        self.request = request
        self.entry = entry
        self.excluded = excluded
        self.work = work
        self.service = service(work.prompt_tokens, work.answer_tokens)
        self.seconds_max = seconds_max
        self.arrived_at_seconds = arrived_at_seconds
        """When its client asked; it may have been given back by a node since."""
        self.deadline_seconds = joined_at_seconds + seconds_max
        self.turn: asyncio.Future[Attempt] = asyncio.get_running_loop().create_future()
        self.number = 0

    @property
    def queued(self) -> Queued:
        """As one of those that wait."""
        return Queued(1, self.work.wanted_tokens)


@dataclass(slots=True)
class _Account:
    """What it was given over its weight, as far as its answers are over, and what those under way were charged in advance."""

    given: float
    pending: float = 0.0
    running_count: int = 0
    weight: float = 1.0
    waiting_service: float = 0.0
    waiting: Queued = NOBODY

    @property
    def counter(self) -> float:
        return self.given + self.pending


class TierQueue:
    """One model's in one tier."""

    def __init__(self) -> None:
        self._queues: dict[AccountId, deque[WaitingRequest]] = {}
        self._accounts: dict[AccountId, _Account] = {}
        self._level = 0.0
        self._numbers = count(1)
        self.waiting = NOBODY
        """All of them together."""

    def __len__(self) -> int:
        """Requests that wait."""
        return round(self.waiting.count)

    def __iter__(self) -> Iterator[WaitingRequest]:
        return (waiting for queue in tuple(self._queues.values()) for waiting in tuple(queue))

    def join(self, waiting: WaitingRequest) -> None:
        """Behind the account's own."""
        account_id = waiting.request.account_id
        waiting.number = next(self._numbers)
        if account_id not in self._queues:
            self._lift(account_id)
            self._queues[account_id] = deque()
        self._queues[account_id].append(waiting)
        self._count(waiting, 1)

    def leave(self, waiting: WaitingRequest) -> None:
        """Whatever became of it; again is harmless."""
        account_id = waiting.request.account_id
        queue = self._queues.get(account_id, deque())
        if waiting in queue:
            queue.remove(waiting)
            self._count(waiting, -1)
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

    def in_foreseen_turn(self) -> list[WaitingRequest]:
        """Everyone, in the order in which they will be served if nobody else comes."""
        lines = {account_id: tuple(queue) for account_id, queue in self._queues.items()}
        counters = {account_id: self._accounts[account_id].counter for account_id in lines}
        steps = {account_id: [one.service / self._accounts[account_id].weight for one in line] for account_id, line in lines.items()}
        return [lines[account_id][index] for account_id, index in turn_order(counters, steps)]

    def ahead_of(self, request: InferenceRequest, expected_back: Mapping[AccountId, Expected]) -> Queued:
        """What would come before the request if it joined now, those included that were told to come back."""
        own = Backlog(self._counter_if_it_joined(request.account_id), request.caller.weight, 0.0, NOBODY)
        others = []
        for account_id in self._queues.keys() | expected_back.keys():
            backlog = self._backlog(account_id, expected_back.get(account_id))
            if account_id == request.account_id:
                own = Backlog(own.counter, own.weight, backlog.service, backlog.work)
            else:
                others.append(backlog)
        return work_ahead(others, own)

    def newest_to_give_way(self, newcomer: AccountId) -> WaitingRequest | None:
        """Whose place in a full queue is the newcomer's; None: nobody's."""
        account_id = gives_way({account_id: len(queue) for account_id, queue in self._queues.items()}, newcomer)
        return None if account_id is None else self._queues[account_id][-1]

    def newest_of_most(self) -> WaitingRequest:
        """The newest request of the account with most of them; somebody waits."""
        return max(self._queues.values(), key=len)[-1]

    def place_of(self, waiting: WaitingRequest) -> tuple[int, int]:
        """Its place among all, and among its account's own; 1 comes next."""
        own = self._queues[waiting.request.account_id].index(waiting) + 1
        return self.in_foreseen_turn().index(waiting) + 1, own

    def charge(self, request: InferenceRequest, work: Work) -> float:
        """One is dispatched, whether it has waited or not: what its account is charged in advance."""
        expected = service(work.prompt_tokens, work.answer_tokens)
        if request.account_id not in self._queues:
            self._lift(request.account_id)
        account = self._accounts[request.account_id]
        account.weight = request.caller.weight
        self._level = account.given
        account.pending += expected / account.weight
        account.running_count += 1
        return expected

    def correct(self, request: InferenceRequest, expected: float, attempt: Attempt) -> None:
        """Its answer is over: the account is charged what it came to, and of its node's word for that no more than can be true."""
        # Of an answer in one piece that broke off nobody knows how far it had come.
        given = service(request.prompt_bytes / BYTES_PER_TOKEN, attempt.relayed_token_count) if request.stream else expected
        if (usage := attempt.usage) is not None:
            most = service(request.prompt_bytes + TEMPLATE_TOKENS_ALLOWANCE, attempt.completion_tokens_max)
            given = min(service(usage.prompt_token_count, usage.completion_token_count), most)
        account = self._accounts[request.account_id]
        account.given += given / request.caller.weight
        account.running_count -= 1
        # Sums of fractions do not come back to nothing by themselves.
        account.pending = account.pending - expected / request.caller.weight if account.running_count else 0.0

    def _count(self, waiting: WaitingRequest, sign: int) -> None:
        account = self._accounts[waiting.request.account_id]
        account.weight = waiting.request.caller.weight
        change = Queued(sign, sign * waiting.work.wanted_tokens)
        account.waiting += change
        account.waiting_service += sign * waiting.service
        self.waiting += change
        if account.waiting.count < 1:
            account.waiting, account.waiting_service = NOBODY, 0.0
        if self.waiting.count < 1:
            self.waiting = NOBODY

    def _backlog(self, account_id: AccountId, expected_back: Expected | None) -> Backlog:
        account = self._accounts.get(account_id) or _Account(self._level)
        if expected_back is None:
            return Backlog(account.counter, account.weight, account.waiting_service, account.waiting)
        return Backlog(
            account.counter, account.weight, account.waiting_service + expected_back.service, account.waiting + expected_back.queued
        )

    def _counter_if_it_joined(self, account_id: AccountId) -> float:
        account = self._accounts.get(account_id) or _Account(0.0)
        if account_id in self._queues:
            return account.counter
        return lifted(account.given, (self._accounts[one].given for one in self._queues), self._level) + account.pending

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
