"""What this gateway measured of replicas and requests, kept for the next placement: the shell around what `domain` learns.

Decides nothing of its own: `domain.speeds` says what an attempt teaches, `domain.prefixes` what a cache may hold. It
counts what is under way at each replica, notes when an attempt began and got its first token, and learns once at its end; a token costs
nothing here. It must not know links, queues or money.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple

from potluck_coordinator.domain import hedging
from potluck_coordinator.domain import speeds as speeds_module
from potluck_coordinator.domain.cost import cost
from potluck_coordinator.domain.forecast import Forecast, Work
from potluck_coordinator.domain.hedging import FirstTokens
from potluck_coordinator.domain.prefixes import CacheState, cached_tokens
from potluck_coordinator.domain.speeds import AttemptTimes, ReadTogether, Speeds
from potluck_coordinator.gateway.prefix_map import PrefixMap

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.relay import Relay
    from potluck_protocol.values import AttemptId, EngineStatus, ReplicaId, Usage

_GUESS: Final = Work(Forecast().prompt_tokens, Forecast().answer_tokens)
"""Of a request that nobody has looked at."""
REPLICAS_KEPT_MAX: Final = 10_000
"""Whose speeds are remembered beyond their sessions; above that those go that were asked for longest ago and have nothing under way."""
WARM_MAX: Final = 4
"""Holders of a prompt's beginning that a placement looks at."""
DISTANCE_HELD_FACTOR: Final = 1.25
"""One that still knew after so many tokens holds somewhat more, maybe: else what was once believed too small would stay so."""
READ_FACTOR: Final = 2.0
"""So many times as long as foreseen, and a prompt whose answer shows nothing before its end is taken for read."""
DISTANCE_MISSED_SHARE: Final = 0.8
"""A cache that had forgotten after so many tokens holds so much of them at most."""


class Load(NamedTuple):
    """What is under way at one replica."""

    committed_tokens: float
    dispatched_tokens: float
    prefill_backlog_tokens: float
    prefill_since_seconds: float


class Counted(NamedTuple):
    """What an attempt came to."""

    usage: Usage | None = None
    """By its engine's count, if there is one."""
    token_count: int = 0
    """Relayed."""
    was_outrun: bool = False


class _Attempt:
    """One under way."""

    __slots__ = (
        "ahead_tokens",
        "area",
        "began_at",
        "cached_tokens",
        "counted",
        "distance_tokens",
        "foreseen_seconds",
        "names",
        "prompt_bytes",
        "read_by",
        "relay",
        "request",
        "tokens",
        "work",
    )

    def __init__(self, request: InferenceRequest, relay: Relay, work: Work, began_at: float) -> None:
        self.request = request
        self.relay = relay
        self.work = work
        self.tokens = work.tokens
        self.began_at = began_at
        self.names, self.prompt_bytes = request.prompt_blocks()
        self.cached_tokens = 0.0
        """As believed when it was dispatched."""
        self.distance_tokens = 0.0
        """What the replica had read since it read that."""
        self.ahead_tokens = 0.0
        """To be read there before it."""
        self.read_by = began_at
        """Of an answer in one piece nothing is seen before its end: then it has been read for certain."""
        self.area = 0.0
        self.counted: Counted | None = None
        self.foreseen_seconds: float | None = None
        """Until its first token, when it was dispatched; None: nobody has looked."""

    def unread_tokens(self, now: float) -> float:
        """What it adds to the replica's reading; nothing once it has begun to answer."""
        if self.relay.first_chunk_at is not None or (not self.request.stream and now >= self.read_by):
            return 0.0
        return max(1.0, self.work.prompt_tokens - self.cached_tokens)


class _Replica:
    """One replica, as long as it is remembered."""

    __slots__ = ("area", "area_at", "attempts", "cache", "first_tokens", "speeds", "together", "told")

    def __init__(self, now: float) -> None:
        self.attempts: dict[AttemptId, _Attempt] = {}
        self.cache = CacheState()
        self.speeds = speeds_module.prior(None, None)
        self.first_tokens = FirstTokens()
        self.together = ReadTogether(now)
        self.told: tuple[float | None, float | None] = (None, None)
        """The rates by its node's word, from which learning began."""
        self.area = 0.0
        """Attempts under way times seconds, ever."""
        self.area_at = now

    def pass_time(self, now: float) -> None:
        self.area += len(self.attempts) * (now - self.area_at)
        self.area_at = now


class Measures:
    """One gateway's.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.token_seconds_max = math.inf
        """Between two tokens of an answer, as the operator promises it; whoever reads the settings puts it here."""
        self._replicas: OrderedDict[ReplicaId, _Replica] = OrderedDict()
        self._where: dict[AttemptId, ReplicaId] = {}
        self.prefixes = PrefixMap(self._cache)

    def warm(self, request: InferenceRequest, work: Work) -> dict[ReplicaId, float]:
        """Who holds how many tokens of the request's prompt, the most first."""
        names, prompt_bytes = request.prompt_blocks()
        if not names:
            return {}
        depths = self.prefixes.holders(names, self.now(), WARM_MAX)
        return {replica_id: cached_tokens(depth, prompt_bytes, work.prompt_tokens) for replica_id, depth in depths.items()}

    def hear(self, replica_id: ReplicaId, status: EngineStatus, capacity_tokens: int) -> Speeds:
        """A replica's own word of its rates, where learning begins, and how much its cache holds; its speeds."""
        replica = self._replica(replica_id)
        told = (status.prefill_tokens_per_second, status.decode_tokens_per_second)
        if told != replica.told:
            replica.told, known = told, replica.speeds
            prior = speeds_module.prior(*told)
            replica.speeds = known = known._replace(told_token_seconds=prior.told_token_seconds)
            if not known.prefill_sample_count:
                replica.speeds = known = known._replace(prefill_tokens_per_second=prior.prefill_tokens_per_second)
            if not known.decode_sample_count:
                base, each = prior.decode_base_seconds, prior.decode_each_seconds
                replica.speeds = known._replace(decode_base_seconds=base, decode_each_seconds=each)
        if not replica.cache.capacity_tokens:
            replica.cache = replica.cache._replace(capacity_tokens=float(capacity_tokens))
        return replica.speeds

    def tokens_per_second_since(self, replica_id: ReplicaId, since: float) -> float | None:
        """How fast it writes a lone answer; None where nothing was learned of it since then."""
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.speeds.decode_sample_count or replica.speeds.learned_at_seconds < since:
            return None
        return 1 / replica.speeds.decode_seconds(1.0)

    def load(self, replica_id: ReplicaId, heard_at: float) -> Load:
        """What is under way there; its node's last word is of `heard_at`."""
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.attempts:
            return Load(0.0, 0.0, 0.0, 0.0)
        committed = dispatched = backlog = since = 0.0
        now = self.now()
        for attempt in replica.attempts.values():
            committed += attempt.tokens
            if attempt.began_at >= heard_at:
                dispatched += attempt.tokens
            # Whoever began first comes first.
            if unread := attempt.unread_tokens(now):
                since = since if backlog else attempt.began_at
                backlog += unread
        return Load(committed, dispatched, backlog, since)

    def began_anew(self, replica_id: ReplicaId) -> None:
        """Its engine did: nothing is cached there, and its cache may hold another number of tokens."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.cache = CacheState(beginning=replica.cache.beginning + 1)

    def begin(self, replica_id: ReplicaId, attempt_id: AttemptId, request: InferenceRequest, relay: Relay) -> None:
        """An attempt is dispatched."""
        now, replica = self.now(), self._replica(replica_id)
        attempt = _Attempt(request, relay, request.work or _GUESS, now)
        replica.pass_time(now)
        if not replica.attempts:
            replica.together = ReadTogether(now)
        attempt.area = replica.area
        rate = replica.speeds.prefill_tokens_per_second
        backlog = since = 0.0
        for other in replica.attempts.values():
            if unread := other.unread_tokens(now):
                since = since if backlog else other.began_at
                backlog += unread
        attempt.ahead_tokens = max(0.0, backlog - rate * (now - since)) if backlog else 0.0
        if attempt.names:
            depth, attempt.distance_tokens = self.prefixes.depth(replica_id, attempt.names, now)
            attempt.cached_tokens = cached_tokens(depth, attempt.prompt_bytes, attempt.work.prompt_tokens)
            self.prefixes.read(replica_id, attempt.names, now)
        attempt.read_by = now + READ_FACTOR * (attempt.ahead_tokens + attempt.work.prompt_tokens) / rate
        replica.attempts[attempt_id] = attempt
        self._where[attempt_id] = replica_id

    def foresee(self, attempt_id: AttemptId, replica: ReplicaView) -> float | None:
        """Of an attempt that was dispatched to the replica, as it was before: after so long without a first token it is late, if ever."""
        if attempt_id not in self._where:
            return None
        known = self._replicas[replica.replica_id]
        attempt = known.attempts[attempt_id]
        if not attempt.request.stream:
            return None
        foreseen = cost(replica, attempt.work, attempt.began_at, attempt.cached_tokens)
        attempt.foreseen_seconds = foreseen.first_token_seconds
        return hedging.late_after_seconds(known.first_tokens, attempt.foreseen_seconds)

    def count(self, attempt_id: AttemptId, usage: Usage | None, token_count: int, *, was_outrun: bool = False) -> None:
        """What an attempt came to, told before it is over: its engine's count, if there is one, and the tokens that were relayed."""
        replica_id = self._where.get(attempt_id)
        if replica_id is not None:
            self._replicas[replica_id].attempts[attempt_id].counted = Counted(usage, token_count, was_outrun)

    def counted(self, attempt_id: AttemptId) -> Counted:
        """What was told of an attempt that is under way; nothing yet: nothing."""
        replica_id = self._where.get(attempt_id)
        return (None if replica_id is None else self._replicas[replica_id].attempts[attempt_id].counted) or Counted()

    def work_of(self, attempt_id: AttemptId) -> Work:
        """What an attempt that is under way is expected to be."""
        return self._replicas[self._where[attempt_id]].attempts[attempt_id].work

    def end(self, attempt_id: AttemptId) -> None:
        """Nobody waits for an attempt any more. One that was counted teaches."""
        replica_id = self._where.pop(attempt_id, None)
        if replica_id is None:
            return
        replica, now = self._replicas[replica_id], self.now()
        replica.pass_time(now)
        attempt = replica.attempts.pop(attempt_id)
        self._learn_first_token(replica, attempt, now)
        if attempt.relay.first_chunk_at is None:
            self.prefixes.unread(replica_id, attempt.names)
        elif attempt.counted is not None:
            self._learn(replica, attempt, attempt.counted.usage, attempt.counted.token_count, now)

    @staticmethod
    def _learn_first_token(replica: _Replica, attempt: _Attempt, now: float) -> None:
        """How late it came. Of one that was cancelled for being late, so far; of all others that gave none, nothing."""
        relay, came_at = attempt.relay, attempt.relay.first_chunk_at
        if came_at is None and attempt.counted is not None and attempt.counted.was_outrun:
            came_at = now
        refused = relay.head is not None and relay.head.http_status != HTTPStatus.OK
        if attempt.foreseen_seconds is not None and came_at is not None and not refused:
            taken_seconds = came_at - attempt.began_at
            replica.first_tokens = hedging.learned(replica.first_tokens, taken_seconds, attempt.foreseen_seconds)

    def _learn(self, replica: _Replica, attempt: _Attempt, usage: Usage | None, token_count: int, now: float) -> None:
        relay, request, expected = attempt.relay, attempt.request, attempt.work.prompt_tokens
        assert relay.first_chunk_at is not None, "checked by the caller"
        cached, prompt_tokens, answer_tokens = attempt.cached_tokens, expected, token_count
        if usage is not None and usage.prompt_token_count:
            # No prompt has more tokens than its body has bytes, whatever a node says.
            prompt_tokens = min(usage.prompt_token_count, request.prompt_bytes)
            cached = min(usage.cached_prompt_token_count, prompt_tokens)
            answer_tokens = usage.completion_token_count
            self._confirm(replica, attempt, cached, prompt_tokens)
        own_tokens, seconds = max(0.0, prompt_tokens - cached), max(now - attempt.began_at, 1e-6)
        times = AttemptTimes(
            read_tokens=attempt.ahead_tokens + own_tokens,
            first_token_seconds=relay.first_chunk_at - attempt.began_at,
            # Of several answers at once the times are nobody's in particular; of one in a piece there is only its end.
            answer_tokens=answer_tokens if request.stream and request.answer_count == 1 else 0,
            answer_seconds=relay.last_chunk_at - relay.first_chunk_at,
            batch_mean=max(1.0, (replica.area - attempt.area) / seconds),
        )
        if request.stream:
            replica.speeds = speeds_module.learned(replica.speeds, times, now)
        elif usage is not None:
            # What was believed cached may have been, whatever its engine counts.
            read_tokens = min(own_tokens, max(0.0, prompt_tokens - attempt.cached_tokens))
            together = replica.together = speeds_module.read_together(replica.together, read_tokens, attempt.began_at, now)
            alone, with_others = (read_tokens, seconds), (together.tokens, max(now - together.since_seconds, 1e-6))
            shown = max(alone, with_others, key=lambda each: each[0] / each[1])
            replica.speeds = speeds_module.learned_in_one_piece(replica.speeds, *shown)
        replica.cache = replica.cache._replace(read_tokens=replica.cache.read_tokens + own_tokens + answer_tokens)

    def _confirm(self, replica: _Replica, attempt: _Attempt, cached: int, prompt_tokens: int) -> None:
        """Where less was cached than was believed, the cache forgets sooner than was believed; where as much was, later."""
        if not attempt.cached_tokens or not attempt.names:
            return
        cache, distance = replica.cache, attempt.distance_tokens
        if 2 * cached / prompt_tokens < attempt.cached_tokens / attempt.work.prompt_tokens:
            capacity = min(cache.capacity_tokens or distance, distance * DISTANCE_MISSED_SHARE)
            replica.cache = cache._replace(capacity_tokens=max(1.0, capacity))
        elif cache.capacity_tokens:
            replica.cache = cache._replace(capacity_tokens=max(cache.capacity_tokens, distance * DISTANCE_HELD_FACTOR))

    def _cache(self, replica_id: ReplicaId) -> CacheState:
        replica = self._replicas.get(replica_id)
        return CacheState(beginning=-1) if replica is None else replica.cache

    def _replica(self, replica_id: ReplicaId) -> _Replica:
        replica = self._replicas.get(replica_id)
        if replica is None:
            replica = self._replicas[replica_id] = _Replica(self.now())
            self._forget()
        return replica

    def _forget(self) -> None:
        if len(self._replicas) > REPLICAS_KEPT_MAX:
            idle = next((replica_id for replica_id, replica in self._replicas.items() if not replica.attempts), None)
            if idle is not None:
                del self._replicas[idle]
