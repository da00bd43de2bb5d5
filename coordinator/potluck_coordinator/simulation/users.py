"""Who asks when, and for how much: the modelled users of a scenario.

Decides arrivals (open loop, by a day's curve), the turns of sessions, how long prompts and answers are, and that a client whose request was
refused or failed comes back. The same seed makes the same users whatever the policy does, but for what they do in answer to it. It must not
know nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Final

from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.asking import Outcome, Request
from potluck_coordinator.simulation.engine_model import Prefix
from potluck_coordinator.simulation.scenario import Scenario, Users
from potluck_protocol.values import AccountId

HOURS_OF_DAY: Final = 24
RETRY_SPREAD: Final = 0.25
"""Clients that were told the same time do not come back at the same moment."""


class Session:
    """One person's turns; each prompt has everything before it."""

    __slots__ = ("account_id", "context_tokens", "key", "random", "turns_left")

    def __init__(self, key: str, account_id: AccountId, turns: int, random: Random) -> None:
        self.key = key
        self.account_id = account_id
        self.turns_left = turns
        self.context_tokens = 0
        self.random = random


class Crowd:
    """All users of one entry of a scenario."""

    def __init__(
        self, users: Users, scenario: Scenario, agenda: Agenda, random: Random, numbers: count[int], ask: Callable[[Request], None]
    ) -> None:
        self.users = users
        self.retry_count = 0
        self.session_count = 0
        self.finished_session_count = 0
        """Sessions all of whose turns were answered."""
        self._scenario = scenario
        self._agenda = agenda
        self._random = random
        self._numbers = numbers
        self._ask = ask
        self._until = scenario.seconds if users.for_seconds == 0 else min(scenario.seconds, users.from_seconds + users.for_seconds)
        self._tries: dict[int, int] = {}
        self._context_tokens = scenario.request_tokens_max
        """What is longer no node takes: a conversation that comes so far is over."""

    def begin(self) -> None:
        """Puts the first arrivals on the agenda."""
        if self.users.requests_per_second > 0:
            self._agenda.at(self._next(self.users.from_seconds, self.users.requests_per_second), self._single)
        if self.users.sessions_per_hour > 0:
            self._agenda.at(self._next(self.users.from_seconds, self.users.sessions_per_hour / 3600), self._session)
        for number in range(self.users.people):
            person = Random(self._random.getrandbits(64))
            at = self.users.from_seconds + person.expovariate(1 / self.users.think_seconds)
            self._agenda.at(at, self._begin_session, AccountId(f"{self.users.name}-{number}"), person)

    def ended(self, request: Request) -> None:
        """One of its requests is over: the session's next turn, or another try."""
        session = request.user
        tries = self._tries.pop(request.number, 0)
        if request.outcome is Outcome.SERVED:
            if isinstance(session, Session):
                session.context_tokens = request.prompt_tokens + request.delivered_tokens
                if session.context_tokens + self.users.prompt_tokens + self.users.answer_tokens_max > self._context_tokens:
                    session.turns_left = 0
                self.finished_session_count += session.turns_left == 0
                if session.turns_left > 0:
                    self._agenda.after(session.random.expovariate(1 / self.users.think_seconds), self._turn, session)
                else:
                    self._over(session)
            return
        if request.outcome is Outcome.TOO_LONG:
            # Whoever comes back with the same hears the same.
            if isinstance(session, Session):
                self._over(session)
            return
        if tries < self.users.retries_max and request.outcome is not Outcome.LEFT:
            self.retry_count += 1
            wait = request.retry_after_seconds * (1.0 + self._random.uniform(0, RETRY_SPREAD))
            self._agenda.after(wait, self._again, request, tries + 1)
        elif isinstance(session, Session) and self.users.people and self._agenda.now < self._until:
            # Whoever is always there still wants that answer: he comes back to it, whatever policy sent him away.
            self._agenda.after(session.random.expovariate(1 / self.users.away_seconds), self._again, request, 0)

    def _over(self, session: Session) -> None:
        """Whoever is always there begins another one."""
        if self.users.people and self._agenda.now < self._until:
            wait = session.random.expovariate(1 / self.users.think_seconds)
            self._agenda.after(wait, self._begin_session, session.account_id, session.random)

    def _next(self, at: float, rate: float) -> float:
        """Of a Poisson process whose rate follows the day: drawn at its highest, and thinned."""
        hourly = self.users.hourly
        highest = max(hourly, default=1.0)
        while True:
            at += self._random.expovariate(rate * highest)
            if not hourly or at >= self._until:
                return at
            hour = int((self._scenario.begins_at_hour + at / 3600) % HOURS_OF_DAY)
            if self._random.random() * highest < hourly[hour]:
                return at

    def _account(self) -> AccountId:
        return AccountId(f"{self.users.name}-{self._random.randrange(self.users.account_count)}")

    def _single(self) -> None:
        if self._agenda.now >= self._until:
            return
        self._send(self._account(), self._length(self._random, self.users.prompt_tokens, self.users.prompt_spread), None, self._random)
        self._agenda.at(self._next(self._agenda.now, self.users.requests_per_second), self._single)

    def _session(self) -> None:
        if self._agenda.now >= self._until:
            return
        # Of its own: what other sessions do changes nothing about this one.
        self._begin_session(self._account(), Random(self._random.getrandbits(64)))
        self._agenda.at(self._next(self._agenda.now, self.users.sessions_per_hour / 3600), self._session)

    def _begin_session(self, account_id: AccountId, random: Random) -> None:
        self.session_count += 1
        turns = 1 + int(random.expovariate(1.0) * (self.users.turns_mean - 1) + 0.5)
        self._turn(Session(f"{self.users.name}/{next(self._numbers)}", account_id, turns, random))

    def _turn(self, session: Session) -> None:
        session.turns_left -= 1
        typed = self._length(session.random, self.users.prompt_tokens, self.users.prompt_spread)
        self._send(session.account_id, typed, session, session.random)

    def _length(self, random: Random, mean: float, spread: float) -> int:
        """Log-normal with that mean; at least one token."""
        if spread == 0:
            return max(1, round(mean))
        return max(1, round(random.lognormvariate(math.log(mean) - spread * spread / 2, spread)))

    def _send(self, account_id: AccountId, typed_tokens: int, session: Session | None, random: Random) -> None:
        users = self.users
        shared = users.shared_prefix_tokens
        before = session.context_tokens if session is not None else 0
        prompt = typed_tokens + (before or shared)
        answer = min(users.answer_tokens_max, self._length(random, users.answer_tokens, users.answer_spread))
        prefixes: tuple[Prefix, ...] = (Prefix(session.key, before, grows=True),) if session is not None else ()
        if shared:
            prefixes += (Prefix(users.name, shared),)
        self._ask(self._request(account_id, prompt, answer, prefixes, session))

    def _request(self, account_id: AccountId, prompt: int, answer: int, prefixes: tuple[Prefix, ...], session: object) -> Request:
        users = self.users
        return Request(
            next(self._numbers),
            account_id,
            self._agenda.now,
            prompt,
            answer,
            users.answer_tokens_max,
            prefixes,
            users.patience_seconds,
            users.name,
            session,
            tier=users.tier,
            weight=users.weight,
        )

    def _again(self, request: Request, tries: int) -> None:
        again = self._request(request.account_id, request.prompt_tokens, request.answer_tokens, request.prefixes, request.user)
        again.first_number = request.first_number
        self._tries[again.number] = tries
        self._ask(again)
