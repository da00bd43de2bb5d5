"""What a batching engine's work costs, and how it collapses: continuous batching over a finite cache of keys and values, as vLLM does it.

Decides, step by step, which requests are computed, which wait, which are put out again for want of cache (preempted: their cache is
thrown away and computed anew later), how long the step takes, and when the engine dies of what it was given. Plain arithmetic: the same
requests in the same order give the same steps. It must not know clocks, sockets or what the tokens say; `batch_runner` gives the steps
their time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields
from typing import Any, Final

_MAY_BE_ZERO: Final = frozenset({"step_ms", "step_ms_per_request"})


@dataclass(frozen=True, slots=True)
class CostModel:
    """One engine on one card."""

    prefill_tokens_per_second: float
    """Prompt tokens, and those of a preempted request that are computed again."""
    step_ms: float
    """One token for everyone in the batch, less what each of them adds."""
    step_ms_per_request: float
    kv_capacity_tokens: int
    batch_max: int = 256
    """Requests computed at a time; vLLM's `max_num_seqs`."""
    step_tokens_max: int = 2048
    """Prompt tokens computed in one step; vLLM's `max_num_batched_tokens`."""
    kv_overcommit_max: float = 1.5
    """It dies when what it has begun is so many times its cache: what is put out has to be kept somewhere."""
    waiting_tokens_max: int = 262_144
    """It dies when the prompts that wait inside it have more tokens: the machine's memory ends, too."""

    @classmethod
    def from_values(cls, values: Any) -> CostModel:
        """Reads the JSON object of a script; raises ValueError for a name or a number that it cannot have."""
        known = {field.name: field.type for field in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= set(known):
            raise ValueError(f"a script's cost is an object of {', '.join(known)}")
        for name, value in values.items():
            is_number = isinstance(value, int if known[name] == "int" else int | float) and not isinstance(value, bool)
            if not is_number or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                raise ValueError(f"a script's cost.{name} is a number above zero")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"a script's cost is not complete: {error}") from error

    def step_seconds(self, decoding_count: int, prefill_tokens: int = 0) -> float:
        """How long a step takes that makes a token for so many requests and computes so many tokens of prompts."""
        return (self.step_ms + self.step_ms_per_request * decoding_count) / 1000 + prefill_tokens / self.prefill_tokens_per_second


@dataclass(slots=True)
class _Sequence:
    """One request inside the engine."""

    number: int
    prompt_tokens: int
    answer_tokens: int
    generated: int = 0
    computed: int = 0
    """Tokens of it whose keys and values are in the cache."""

    @property
    def known_tokens(self) -> int:
        return self.prompt_tokens + self.generated


@dataclass(frozen=True, slots=True)
class Step:
    """What one step came to."""

    seconds: float
    told: tuple[int, ...]
    """The requests that have one token more."""
    preempted_count: int = 0


class EngineDiedError(Exception):
    """The engine was given more than it could bear.

    Attributes:
        of_host_memory: the machine's memory ended, and not the card's.
    """

    def __init__(self, message: str, *, of_host_memory: bool) -> None:
        super().__init__(message)
        self.of_host_memory = of_host_memory


class Batch:
    """The requests inside one engine."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._waiting_tokens = 0
        self._number = 0
        self.generated_tokens = 0
        self.preempted_count = 0

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def kv_used_tokens(self) -> int:
        """What the cache holds, or has set aside for those that it is being computed for."""
        return sum(sequence.known_tokens for sequence in self._running)

    @property
    def begun_tokens(self) -> int:
        """Of the requests that are computed or were put out again."""
        return self.kv_used_tokens + sum(sequence.known_tokens for sequence in self._waiting if sequence.generated)

    def add(self, prompt_tokens: int, answer_tokens: int) -> int:
        """Takes a request and gives it a number; one that can never fit is the caller's to refuse. Raises EngineDiedError."""
        self._number += 1
        self._waiting.append(_Sequence(self._number, prompt_tokens, answer_tokens))
        self._waiting_tokens += prompt_tokens
        if self._waiting_tokens > self._cost.waiting_tokens_max:
            message = f"{len(self._waiting)} prompts of {self._waiting_tokens} tokens wait, and the machine's memory is full"
            raise EngineDiedError(message, of_host_memory=True)
        return self._number

    def remove(self, number: int) -> None:
        """Forgets a request that nobody waits for any more; again is harmless."""
        self._running = [sequence for sequence in self._running if sequence.number != number]
        for sequence in self._waiting:
            if sequence.number == number:
                self._waiting.remove(sequence)
                self._waiting_tokens -= sequence.known_tokens
                return

    def step(self) -> Step | None:
        """Computes what one step computes; None: there is nothing to do. Raises EngineDiedError."""
        budget = self._cost.step_tokens_max
        preempted_count = self._make_room()
        prefilled, decoding = 0, 0
        told: list[_Sequence] = []
        for sequence in self._running:
            if sequence.computed >= sequence.known_tokens - 1 and sequence.generated:
                decoding += 1
                told.append(sequence)
                continue
            prefilled += self._prefill(sequence, budget - prefilled, told)
        # One that was just put out would only come back for another to go.
        while not preempted_count and prefilled < budget and (newcomer := self._next_to_begin()) is not None:
            prefilled += self._prefill(newcomer, budget - prefilled, told)
        if not told and not prefilled:
            return None
        for sequence in told:
            sequence.computed = sequence.known_tokens
            sequence.generated += 1
        self.generated_tokens += len(told)
        self._running = [sequence for sequence in self._running if sequence.generated < sequence.answer_tokens]
        self.preempted_count += preempted_count
        self._check_overcommit()
        return Step(self._cost.step_seconds(decoding, prefilled), tuple(sequence.number for sequence in told), preempted_count)

    def _prefill(self, sequence: _Sequence, budget: int, told: list[_Sequence]) -> int:
        """Computes as much of it as there is budget for; with the last of it comes the next token."""
        tokens = min(sequence.known_tokens - sequence.computed, budget)
        sequence.computed += tokens
        if sequence.computed == sequence.known_tokens:
            told.append(sequence)
        return tokens

    def _make_room(self) -> int:
        """Every running request wants one token more; the newest are put out until the others have it. How many were."""
        count = 0
        while len(self._running) > 1 and self.kv_used_tokens + len(self._running) > self._cost.kv_capacity_tokens:
            sequence = self._running.pop()
            sequence.computed = 0
            self._waiting.appendleft(sequence)
            self._waiting_tokens += sequence.known_tokens
            count += 1
        return count

    def _next_to_begin(self) -> _Sequence | None:
        if not self._waiting or len(self._running) >= self._cost.batch_max:
            return None
        if self.kv_used_tokens + self._waiting[0].known_tokens + len(self._running) + 1 > self._cost.kv_capacity_tokens:
            return None
        sequence = self._waiting.popleft()
        self._waiting_tokens -= sequence.known_tokens
        self._running.append(sequence)
        return sequence

    def _check_overcommit(self) -> None:
        begun, bound = self.begun_tokens, self._cost.kv_overcommit_max * self._cost.kv_capacity_tokens
        if begun > bound:
            message = f"{begun} tokens are begun and the cache holds {self._cost.kv_capacity_tokens}"
            raise EngineDiedError(message, of_host_memory=False)
