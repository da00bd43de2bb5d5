"""A modelled inference engine: one accelerator that batches continuously, in a memory that ends.

Decides when a prompt has been read, when an answer ends, and what happens when the cache of keys and values is full. Time passes lazily:
all running answers get a token in each step, so one clock of steps serves for all of them, and something has to be computed only when the
batch changes. The equations and their sources are in `docs/simulator.md`. It must not know nodes, links or policies.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum, StrEnum
from heapq import heappop, heappush
from itertools import count
from typing import Final

TOKENS_EPSILON: Final = 1e-6
"""Two sums of the same fractions differ by less."""
SECONDS_EPSILON: Final = 1e-7
"""What would happen within so little happens now: a virtual clock that has run for days tells no less apart."""


class WhenFull(StrEnum):
    """What an engine does when the batch has outgrown its cache."""

    PREEMPT = "preempt"
    """The newest answer is taken out of the batch and read again later, as vLLM does."""
    DIE = "die"
    """Out of memory: the process ends, as engines without paging do."""


@dataclass(frozen=True, slots=True)
class EngineModel:
    """The cost model of an engine on a card with nothing else to do, cool and at full power."""

    prefill_tokens_per_second: float
    step_seconds: float
    """Of one decoding step with an empty batch: reading the weights."""
    step_seconds_per_answer: float
    """What each answer of the batch adds to it."""
    kv_tokens: int
    batch_max: int = 64
    """Answers at a time; more wait inside the engine, whose queue has no end."""
    prefill_chunk_tokens: int = 512
    """What of a prompt is read within one step while answers run: these get their tokens that much later."""
    when_full: WhenFull = WhenFull.PREEMPT
    restart_seconds: float = 60.0


class Stage(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    READING = "reading"
    RUNNING = "running"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Prefix:
    """A part of a prompt that others begin with, too: a session's turns so far, or what a whole group of users sends first."""

    key: str
    tokens: int
    grows: bool = False
    """A session's own: its next turn begins with all of this one's prompt and answer."""


class Sequence:
    """One prompt and its answer in the engine. `tokens_before` of the answer are part of the prompt already."""

    __slots__ = (
        "end_clock",
        "hit_tokens",
        "joined_clock",
        "number",
        "owner",
        "prefixes",
        "prompt_tokens",
        "read_left",
        "stage",
        "to_go",
        "tokens_before",
    )

    def __init__(self, owner: object, prompt_tokens: int, answer_tokens: int, prefixes: tuple[Prefix, ...] = ()) -> None:
        self.owner = owner
        self.prompt_tokens = prompt_tokens
        self.prefixes = prefixes
        self.to_go = answer_tokens
        self.hit_tokens = 0
        self.tokens_before = 0
        self.stage = Stage.WAITING
        self.number = -1
        self.read_left = 0.0
        self.joined_clock = 0.0
        self.end_clock = 0.0


class Happening(Enum):
    """What an engine did."""

    FIRST_TOKEN = "first_token"  # noqa: S105 - of an answer
    FINISHED = "finished"
    DIED = "died"


class Engine:
    """One running engine. Whoever calls it says what time it is; `due_seconds` says when it wants to be called next."""

    __slots__ = (
        "_at",
        "_cache",
        "_cached_tokens",
        "_clock",
        "_decode_share",
        "_heap",
        "_kv_tokens",
        "_numbers",
        "_prefill_share",
        "_reading",
        "_running",
        "_step_seconds",
        "_waiting",
        "busy_seconds",
        "hit_tokens",
        "made_tokens",
        "model",
        "preempted_count",
        "read_tokens",
        "room_tokens",
        "stopped",
    )

    def __init__(self, model: EngineModel, now: float, context_tokens: int | None = None) -> None:
        self.model = model
        self.room_tokens = model.kv_tokens if context_tokens is None else min(model.kv_tokens, context_tokens)
        """Of one sequence, prompt and answer together: no engine starts with a context that its cache does not hold."""
        self.stopped = False
        self.busy_seconds = 0.0
        self.read_tokens = 0.0
        self.hit_tokens = 0
        self.made_tokens = 0.0
        self.preempted_count = 0
        self._at = now
        self._clock = 0.0
        self._prefill_share = 1.0
        self._decode_share = 1.0
        self._step_seconds = math.inf
        self._kv_tokens = 0.0
        self._numbers = count()
        self._waiting: deque[Sequence] = deque()
        self._reading: Sequence | None = None
        self._running: dict[int, Sequence] = {}
        self._heap: list[tuple[float, int, Sequence]] = []
        self._cache: OrderedDict[str, int] = OrderedDict()
        self._cached_tokens = 0

    @property
    def running_count(self) -> int:
        """Answers in the batch."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Prompts that are being read or wait for it."""
        return len(self._waiting) + (self._reading is not None)

    @property
    def kv_tokens(self) -> float:
        """What the batch holds of the cache; kept prefixes are no part of it, for they give way."""
        return self._kv_tokens

    @property
    def unread_tokens(self) -> float:
        """Of the prompts that wait or are being read."""
        reading = self._reading.read_left if self._reading is not None else 0.0
        return reading + sum(sequence.prompt_tokens for sequence in self._waiting)

    @property
    def speed_shares(self) -> tuple[float, float]:
        """Of the model's speeds, prefill and decode, that it has now."""
        return self._prefill_share, self._decode_share

    @property
    def is_reading(self) -> bool:
        """Whether a prompt is being read: what a card spends most power on."""
        return self._reading is not None

    def set_speed(self, prefill_share: float, decode_share: float, now: float) -> None:
        """Of what the model says; the engine goes on at it from now."""
        self._advance(now)
        self._prefill_share = prefill_share
        self._decode_share = decode_share
        self._pace()

    def stop_or_go(self, now: float, *, stopped: bool) -> None:
        """Freezes it, or lets it go on."""
        self._advance(now)
        self.stopped = stopped
        self._pace()

    def submit(self, sequence: Sequence, now: float) -> bool:
        """Takes a prompt; its answer ends where the context does. False: that has no room for it and a token, and it never runs."""
        if sequence.prompt_tokens >= self.room_tokens:
            sequence.stage = Stage.OVER
            return False
        self._advance(now)
        sequence.number = next(self._numbers)
        sequence.to_go = min(sequence.to_go, self.room_tokens - sequence.prompt_tokens)
        self._waiting.append(sequence)
        self._begin_reading()
        return True

    def cancel(self, sequence: Sequence, now: float) -> None:
        """Nobody wants the answer any more; harmless for one that is over."""
        self._advance(now)
        if sequence.stage is Stage.WAITING and sequence.number >= 0:
            self._waiting.remove(sequence)
        elif sequence.stage in {Stage.READING, Stage.RUNNING}:
            self._release(sequence)
            self._keep(sequence, self._held_tokens(sequence))
        sequence.stage = Stage.OVER
        self._begin_reading()

    def produced(self, sequence: Sequence, now: float) -> int:
        """How many tokens of the answer there are."""
        if sequence.stage is not Stage.RUNNING:
            return sequence.tokens_before
        steps = 0.0 if self.stopped else max(0.0, now - self._at) / self._step_seconds
        return sequence.tokens_before + min(sequence.to_go, 1 + int(self._clock + steps - sequence.joined_clock + TOKENS_EPSILON))

    def busy_seconds_at(self, now: float) -> float:
        """How long it has had something to do in all."""
        idle = self.stopped or self._step_seconds == math.inf
        return self.busy_seconds + (0.0 if idle else now - self._at)

    def due_seconds(self) -> float:
        """Until something happens if nobody does anything; infinity: nothing will."""
        if self.stopped or self._step_seconds is math.inf:
            return math.inf
        steps = math.inf
        if self._running:
            while self._heap[0][2].stage is not Stage.RUNNING or self._heap[0][2].end_clock != self._heap[0][0]:
                heappop(self._heap)
            full_in_steps = (self.model.kv_tokens - self._kv_tokens) / len(self._running)
            steps = min(self._heap[0][0] - self._clock, max(0.0, full_in_steps) + TOKENS_EPSILON)
        if self._reading is not None:
            steps = min(steps, self._reading.read_left / self.model.prefill_chunk_tokens)
        return max(0.0, steps) * self._step_seconds

    def proceed(self, now: float) -> list[tuple[Happening, Sequence | None]]:
        """What has happened until now. An engine that died is of no use any more."""
        self._advance(now)
        happened: list[tuple[Happening, Sequence | None]] = []
        reading = self._reading
        steps = TOKENS_EPSILON + SECONDS_EPSILON / self._step_seconds
        if reading is not None and reading.read_left <= steps * self.model.prefill_chunk_tokens:
            self._reading = None
            self._join(reading)
            happened.append((Happening.FIRST_TOKEN, reading))
        while self._heap and self._heap[0][0] <= self._clock + steps:
            end_clock, _, sequence = heappop(self._heap)
            if sequence.stage is Stage.RUNNING and sequence.end_clock == end_clock:
                self._finish(sequence)
                happened.append((Happening.FINISHED, sequence))
        while self._running and self._kv_tokens >= self.model.kv_tokens - steps * len(self._running):
            if self.model.when_full is WhenFull.DIE:
                return [*happened, (Happening.DIED, None)]
            if len(self._running) == 1 and self._reading is None:
                # Its answer was cut where the cache ends: this is its last token, but for rounding.
                (sequence,) = self._running.values()
                self._finish(sequence)
                happened.append((Happening.FINISHED, sequence))
            else:
                self._preempt()
        self._begin_reading()
        return happened

    def cached_tokens(self, prefixes: tuple[Prefix, ...]) -> int:
        """Of the longest kept prefix among these, which come longest first."""
        return next((min(self._cache[prefix.key], prefix.tokens) for prefix in prefixes if prefix.key in self._cache), 0)

    def _advance(self, now: float) -> None:
        passed = now - self._at
        self._at = now
        if passed <= 0 or self.stopped or self._step_seconds is math.inf:
            return
        steps = passed / self._step_seconds
        self.busy_seconds += passed
        self._clock += steps
        self._kv_tokens += steps * len(self._running)
        self.made_tokens += steps * len(self._running)
        if self._reading is not None:
            read = min(self._reading.read_left, steps * self.model.prefill_chunk_tokens)
            self._reading.read_left -= read
            self.read_tokens += read

    def _pace(self) -> None:
        model, seconds = self.model, 0.0
        if self._running:
            seconds = (model.step_seconds + model.step_seconds_per_answer * len(self._running)) / self._decode_share
        if self._reading is not None:
            seconds += model.prefill_chunk_tokens / (model.prefill_tokens_per_second * self._prefill_share)
        self._step_seconds = seconds or math.inf

    def _begin_reading(self) -> None:
        """The next prompt, if the batch and the cache have room; an engine that dies of a full cache does not look."""
        if self._reading is None and self._waiting and len(self._running) < self.model.batch_max:
            sequence = self._waiting[0]
            fits = self._kv_tokens + sequence.prompt_tokens + 1 <= self.model.kv_tokens
            if fits or self.model.when_full is WhenFull.DIE:
                self._waiting.popleft()
                hit = min(self.cached_tokens(sequence.prefixes), max(0, sequence.prompt_tokens - 1))
                self.hit_tokens += hit
                sequence.hit_tokens = hit
                self._take_up(sequence)
                sequence.stage = Stage.READING
                sequence.read_left = float(sequence.prompt_tokens - hit)
                self._kv_tokens += sequence.prompt_tokens
                self._reading = sequence
                self._make_room()
        self._pace()

    def _join(self, sequence: Sequence) -> None:
        """It has its first token with the prompt's end."""
        sequence.stage = Stage.RUNNING
        sequence.joined_clock = self._clock
        sequence.end_clock = self._clock + sequence.to_go - 1
        self._kv_tokens += 1
        self.made_tokens += 1
        self._running[sequence.number] = sequence
        heappush(self._heap, (sequence.end_clock, sequence.number, sequence))

    def _finish(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._keep(sequence, sequence.prompt_tokens + sequence.to_go)
        sequence.tokens_before += sequence.to_go
        sequence.to_go = 0
        sequence.stage = Stage.OVER

    def _preempt(self) -> None:
        """The newest one goes back to the front of the queue, with what it has of its answer as part of its prompt."""
        if not self._running:
            return
        sequence = self._running[next(reversed(self._running))]
        made = min(sequence.to_go - 1, 1 + int(self._clock - sequence.joined_clock + TOKENS_EPSILON))
        self._release(sequence)
        sequence.tokens_before += made
        sequence.prompt_tokens += made
        sequence.to_go -= made
        sequence.stage = Stage.WAITING
        self._waiting.appendleft(sequence)
        self.preempted_count += 1
        self._pace()

    def _release(self, sequence: Sequence) -> None:
        """Gives its memory back."""
        if sequence.stage is Stage.READING:
            self._reading = None
            self._kv_tokens -= sequence.prompt_tokens
        else:
            del self._running[sequence.number]
            self._kv_tokens -= sequence.prompt_tokens + 1 + (self._clock - sequence.joined_clock)
        if not self._running and self._reading is None:
            self._kv_tokens = 0.0

    def _take_up(self, sequence: Sequence) -> None:
        """A session's past is the sequence's own while it is answered, and held once; what its group shares stays for the others, too."""
        for prefix in sequence.prefixes:
            if prefix.key in self._cache and prefix.grows:
                self._cached_tokens -= self._cache.pop(prefix.key)
            elif prefix.key in self._cache:
                self._cache.move_to_end(prefix.key)

    def _held_tokens(self, sequence: Sequence) -> int:
        """What there is of a sequence that was read or answered until now."""
        if sequence.stage is Stage.READING:
            return sequence.prompt_tokens - math.ceil(sequence.read_left)
        return sequence.prompt_tokens + 1 + int(self._clock - sequence.joined_clock + TOKENS_EPSILON)

    def _keep(self, sequence: Sequence, held_tokens: int) -> None:
        """What a sequence leaves in the cache for the next that begins so: its session's, longest first, and its group's."""
        for prefix in sequence.prefixes:
            tokens = held_tokens if prefix.grows else min(held_tokens, prefix.tokens)
            self._cached_tokens += tokens - self._cache.pop(prefix.key, 0)
            self._cache[prefix.key] = tokens
        self._make_room()

    def _make_room(self) -> None:
        """The least lately used prefixes give way to the batch, from their ends, and no more of them than is wanted."""
        while self._cache and (wanted := math.ceil(self._cached_tokens + self._kv_tokens - self.model.kv_tokens)) > 0:
            key, tokens = next(iter(self._cache.items()))
            given = min(tokens, wanted)
            self._cached_tokens -= given
            if given == tokens:
                del self._cache[key]
            else:
                self._cache[key] = tokens - given
