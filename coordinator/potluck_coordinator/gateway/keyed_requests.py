"""Requests that name an idempotency key: one run for each key, however often and from wherever it is asked for.

Decides where the first run's answer is looked for: here, while it is kept, else in the books, which only know that it was. The books are
asked only for what would be let in: all else is refused before, from memory, since a key costs a commit, and giving it back another. A
request that comes again while the first is being answered reads along from the beginning, and is not refused: a client whose connection
broke wants that very answer, and would otherwise come back again and again for as long as it takes. So a run does not end with its client,
unless the client said so. When a key is free and what is let go is `domain.idempotency`'s; `kept_answer` is what readers read, and
`last_words` tells the books what became of a claim. It must not know HTTP, gRPC or prices. Answers stay in this process's memory, within
bounds, and are never written down.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from potluck_coordinator.domain.idempotency import (
    Kept,
    KeptBounds,
    KeyRecord,
    KeyState,
    KeyUse,
    Standing,
    WhenGone,
    has_spent,
    is_too_much,
    linger_seconds,
    not_kept,
    other_request,
    standing,
)
from potluck_coordinator.gateway.edges import log_unexpected
from potluck_coordinator.gateway.kept_answer import KeptAnswer, Recording
from potluck_coordinator.gateway.last_words import LastWords
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.idempotency_keys import checked_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.domain.catalogue import ServiceTier
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.idempotency_desk import IdempotencyDesk
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import AccountId, NodeId, Usage

STOP_SECONDS_MAX: Final = 2.0
"""For runs to end by themselves, once the requests behind them have."""


class RunningAnswer(Protocol):
    """What is needed of `gateway.answer.Answer`."""

    @property
    def node_id(self) -> NodeId: ...
    @property
    def tier(self) -> ServiceTier: ...
    @property
    def usage(self) -> Usage | None: ...
    @property
    def charge_micro_credits(self) -> int: ...
    async def next_data(self) -> bytes | None: ...
    async def close(self) -> None: ...


class Requests(Protocol):
    """What is needed of `gateway.requests.RequestService`."""

    def announce(self, request: InferenceRequest) -> Callable[[], None]: ...
    async def begin(self, request: InferenceRequest) -> RunningAnswer: ...


@dataclass(slots=True, eq=False)
class _Run:
    """One key's run, under way or over."""

    record: KeyRecord
    when_gone: WhenGone
    recording: Recording
    withdraw: Callable[[], None]
    """It is no longer announced: it begins, or does not."""
    task: asyncio.Task[None] | None = None
    linger: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Shelf:
    """One account's runs that are kept, the oldest first, and what they hold."""

    runs: dict[bytes, _Run] = field(default_factory=dict)
    held_bytes: int = 0


class KeyedRequests:
    """Both edges' way to a request with a key.

    Args:
        requests: who answers.
        desk: who remembers keys.
        clock: for dates.
        hash_key: what keys and bodies are hashed with, the same after a restart.
        gateway_epoch: of this gateway.
        bounds: on what is kept.
    """

    def __init__(
        self,
        requests: Requests,
        desk: IdempotencyDesk,
        clock: Clock,
        *,
        hash_key: bytes,
        gateway_epoch: int,
        bounds: KeptBounds | None = None,
    ) -> None:
        self._requests = requests
        self._desk = desk
        self._last_words = LastWords(desk)
        self._clock = clock
        self._hash_key = hash_key
        self._gateway_epoch = gateway_epoch
        self._bounds = bounds or KeptBounds()
        self._shelves: dict[AccountId, _Shelf] = {}
        self._kept_count = 0
        self._held_bytes = 0
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def held_bytes(self) -> int:
        """What the kept answers come to."""
        return self._held_bytes

    async def begin(self, request: InferenceRequest, key: str, body: bytes, when_gone: WhenGone = WhenGone.FINISH) -> KeptAnswer:
        """The key's answer, which has begun; `body` is the request's as the client sent it.

        A refusal before the key was claimed leaves the key as it was: the client may ask again under it.

        Raises:
            PotluckError: what keeps the request from being answered; INVALID_REQUEST for a key that is none, IDEMPOTENCY_KEY_REUSED for one
                of another request, IDEMPOTENCY_KEY_SPENT or _IN_FLIGHT where the first run's answer is not here, and
                COORDINATOR_UNAVAILABLE where the books would have to be asked and do not answer.
        """
        use = self._use(request, checked_key(key), body)
        if self._kept(use) is None:
            await self._last_words.until_told(use)
        run = self._kept(use)  # somebody else may have come first
        found = standing(run.record if run is not None else None, use, self._clock.unix_ms())
        if run is None or found is Standing.FREE:
            withdraw = self._requests.announce(request)
            return await self._reader(self._start(request, use, when_gone, withdraw), request, is_first=True)
        if found is Standing.OTHER:
            raise other_request(run.record)
        if when_gone is WhenGone.FINISH:
            run.when_gone = when_gone
        return await self._reader(run, request, is_first=False)

    async def stop(self) -> None:
        """Waits until what is under way has ended, with the requests behind it; `drain` comes next."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=STOP_SECONDS_MAX)
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def drain(self, seconds_max: float) -> bool:
        """Waits until the books know what became of every claim; False if that took too long."""
        return await self._last_words.drain(seconds_max)

    def _use(self, request: InferenceRequest, key: str, body: bytes) -> KeyUse:
        return KeyUse(
            account_id=request.account_id,
            key_hash=hashlib.blake2b(key.encode(), digest_size=32, key=self._hash_key, person=b"idempotency-key").digest(),
            body_hash=hashlib.blake2b(
                _sameness(request) + b"\n" + body, digest_size=32, key=self._hash_key, person=b"idempotency-body"
            ).digest(),
            request_id=request.request_id,
            claim_id=secrets.token_hex(16),
            gateway_epoch=self._gateway_epoch,
        )

    async def _reader(self, run: _Run, request: InferenceRequest, *, is_first: bool) -> KeptAnswer:
        if run.linger is not None:
            run.linger.cancel()
            run.linger = None
        reader = KeptAnswer(run.recording, stream=request.stream, is_first=is_first, gone=partial(self._reader_gone, run))
        try:
            await reader.until_begun()
        except BaseException:
            await reader.close()
            raise
        return reader

    def _reader_gone(self, run: _Run) -> None:
        if run.recording.readers or run.recording.is_over or run.task is None:
            return
        seconds = linger_seconds(run.when_gone, placed=run.recording.node_id is not None)
        if seconds is not None:
            run.linger = asyncio.get_running_loop().call_later(seconds, self._abandon, run)

    def _abandon(self, run: _Run) -> None:
        if not run.recording.readers and not run.recording.is_over and run.task is not None:
            run.task.cancel()

    def _start(self, request: InferenceRequest, use: KeyUse, when_gone: WhenGone, withdraw: Callable[[], None]) -> _Run:
        if (lapsed := self._kept(use)) is not None:
            self._let_go(lapsed)
        record = KeyRecord(use, KeyState.CLAIMED, 0, self._clock.unix_ms())
        run = _Run(record, when_gone, Recording(use.request_id), withdraw)
        self._shelves.setdefault(use.account_id, _Shelf()).runs[use.key_hash] = run
        self._kept_count += 1
        run.task = asyncio.ensure_future(self._run(run, request))
        self._under_way.add(run.task)
        run.task.add_done_callback(self._under_way.discard)
        run.task.add_done_callback(lambda _: withdraw())
        return run

    async def _run(self, run: _Run, request: InferenceRequest) -> None:
        """Claims the key, has the request answered, and leaves word of what came of it. A claim that failed may stand all the same."""
        try:
            if (known := await self._desk.claim(run.record.use)) is not None:
                self._refuse(run, known)
                return
            # Not before: a key that is spent already has no answer for which another one would have to go.
            self._make_room(run.record.use.account_id)
            run.withdraw()
            answer = await self._requests.begin(request)
        except asyncio.CancelledError:
            self._came_to_nothing(run, PotluckError(ErrorCode.CANCELLED, "Nobody waited for the answer any more."))
        except PotluckError as error:
            self._came_to_nothing(run, error)
        except Exception as error:  # noqa: BLE001 - its readers are told, and the key is free again
            self._came_to_nothing(run, _unforeseen(run, error))
        else:
            await self._record(run, answer)

    async def _record(self, run: _Run, answer: RunningAnswer) -> None:
        recording, failure = run.recording, None
        recording.begin(answer.node_id, answer.tier)
        try:
            while (data := await answer.next_data()) is not None:
                recording.node_id = answer.node_id  # another one may have gone on with it
                self._append(run, data)
                await recording.until_readers_keep_up()
        except PotluckError as error:
            failure = error
        except asyncio.CancelledError:
            failure = PotluckError(ErrorCode.CANCELLED, "Nobody waited for the answer any more, and it was broken off.")
        except Exception as error:  # noqa: BLE001 - its readers are told
            failure = _unforeseen(run, error)
        finally:
            await answer.close()
        if not has_spent(answer_bytes=recording.answer_bytes, charge_micro_credits=answer.charge_micro_credits) and failure is not None:
            self._came_to_nothing(run, failure)
            return
        recording.end(answer.usage, answer.charge_micro_credits, failure)
        self._last_words.finish(run.record.use, recording.charge_micro_credits)

    def _append(self, run: _Run, data: bytes) -> None:
        held_before = run.recording.held_bytes
        run.recording.append(data)
        if not run.recording.kept:
            return
        grown_bytes = run.recording.held_bytes - held_before
        self._shelves[run.record.use.account_id].held_bytes += grown_bytes
        self._held_bytes += grown_bytes
        if run.recording.held_bytes > self._bounds.answer_bytes_max:
            self._let_go(run)
        self._make_room(run.record.use.account_id)

    def _refuse(self, run: _Run, known: KeyRecord) -> None:
        """The books know the key; what they know is no answer."""
        self._let_go(run)
        is_other = standing(known, run.record.use, known.claimed_at_unix_ms) is Standing.OTHER
        run.recording.end(None, 0, other_request(known) if is_other else not_kept(known, self._gateway_epoch))

    def _came_to_nothing(self, run: _Run, error: PotluckError) -> None:
        """Whoever waits is told at once; who asks anew waits until the key is free."""
        self._last_words.release(run.record.use)
        self._let_go(run)
        run.recording.end(None, 0, error)

    def _kept(self, use: KeyUse) -> _Run | None:
        shelf = self._shelves.get(use.account_id)
        return None if shelf is None else shelf.runs.get(use.key_hash)

    def _make_room(self, account_id: AccountId) -> None:
        while (shelf := self._shelves.get(account_id)) is not None and shelf.runs:
            account, everyone = Kept(len(shelf.runs), shelf.held_bytes), Kept(self._kept_count, self._held_bytes)
            own_is_too_much, all_is_too_much = is_too_much(account, everyone, self._bounds)
            if own_is_too_much:
                self._let_go(next(iter(shelf.runs.values())))
            elif all_is_too_much:
                self._let_go(min((next(iter(one.runs.values())) for one in self._shelves.values()), key=_claimed_at))
            else:
                return

    def _let_go(self, run: _Run) -> None:
        """Forgets a run's answer, but for what its readers have still to read; again is harmless."""
        use = run.record.use
        shelf = self._shelves.get(use.account_id)
        if shelf is None or shelf.runs.get(use.key_hash) is not run:
            return
        del shelf.runs[use.key_hash]
        shelf.held_bytes -= run.recording.held_bytes
        self._held_bytes -= run.recording.held_bytes
        self._kept_count -= 1
        if not shelf.runs:
            del self._shelves[use.account_id]
        run.recording.kept = False
        run.recording.trim()


def _sameness(request: InferenceRequest) -> bytes:
    """What beside the body makes two requests the same: who demands trusted nodes must not get what any node has answered."""
    return request.endpoint.encode() + (b" trusted" if request.trusted_only else b"")


def _unforeseen(run: _Run, error: Exception) -> PotluckError:
    log_unexpected("keyed_request_failed_unexpectedly", run.record.use.request_id, error)
    return PotluckError(ErrorCode.INTERNAL_ERROR)


def _claimed_at(run: _Run) -> int:
    return run.record.claimed_at_unix_ms
