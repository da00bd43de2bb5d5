"""Runs the engines that the directory wishes and the owner allows: observe, plan, act, and again after every change.

`domain.plan` says what to do; files come from `model_store.store`, engines run as `engines.process`. Decides that a replica has at most one
piece of work at a time (a fetch, a start, a running engine, or a stop), which failures are costly to repeat, and, with `domain.step_down`
and `ceilings`, what an engine that ran out of memory is started with next. It must not know the link; it implements `replicas.Replicas`
for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Final, assert_never

import aiohttp
import structlog

from potluck_node.ceilings import Ceilings
from potluck_node.domain.failures import Shortage
from potluck_node.domain.model_source import ATTACHED_KIND, attached_name
from potluck_node.domain.plan import (
    HOLDING,
    Fetch,
    Forget,
    LocalLimits,
    ObservedReplica,
    Phase,
    Refuse,
    Start,
    Stop,
    crashed,
    failed_fetch,
    given_up,
    plan,
    stepped_down,
    under_card_limit,
)
from potluck_node.domain.step_down import UTILIZATION_PERCENT_NOTCHES, Leftover, MemoryPlan, beside_others, plan_of, step_down
from potluck_node.domain.strict_json import BadModelError
from potluck_node.engines.base import Engine, EngineAddress, EngineLaunch
from potluck_node.engines.process import EngineFailedError, EngineProcess, ask, has_token
from potluck_node.model_store.download import FetchFailedError
from potluck_node.model_store.store import ModelStore
from potluck_node.model_store.verification import FileMismatchError
from potluck_node.replica_record import ReplicaRecord, breaker_words
from potluck_node.replicas import Residence
from potluck_protocol.clock import Clock
from potluck_protocol.values import DesiredEngine, DesiredState, EngineStatus, FailureKind, ReplicaId

_log = structlog.get_logger()

_ANY_WORD: Final = aiohttp.ClientTimeout(total=4.0)
"""For any word of an engine at all, on loopback."""


class EngineSupervisor:
    """The engines of this node; `replicas.Replicas` for the link.

    Args:
        engines: what this node can run, by kind.
        store: where model files come from.
        limits: the owner's. `set_paused` changes `paused` later.
        ceilings: how far engines were stepped down for want of memory.
        clock: time.
        environment: the agent's, of which engines see a part.
    """

    def __init__(
        self,
        *,
        engines: Mapping[str, Engine],
        store: ModelStore,
        limits: LocalLimits,
        ceilings: Ceilings,
        clock: Clock,
        environment: Mapping[str, str],
    ) -> None:
        self._engines = dict(engines)
        self._store = store
        self._limits = limits
        self._ceilings = ceilings
        self._clock = clock
        self._environment = dict(environment)
        self._desired = DesiredState()
        self._replicas: dict[ReplicaId, ReplicaRecord] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._death_callbacks: list[Callable[[ReplicaId, FailureKind], None]] = []
        self._changed = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None

    # What the link asks.

    def set_desired(self, desired: DesiredState) -> None:
        """See `Replicas`."""
        self._desired = under_card_limit(desired, self._limits)
        self._changed.set()

    def set_paused(self, paused: bool) -> None:
        """While paused nothing is fetched or started, and running engines are stopped, so that memory and cards are the owner's again."""
        self._limits = replace(self._limits, paused=paused)
        self._changed.set()

    def statuses(self) -> tuple[EngineStatus, ...]:
        """See `Replicas`."""
        return tuple(replica.status(self._engines.get(replica.observed.engine.engine_kind)) for replica in self._replicas.values())

    def slot_count_of(self, replica_id: ReplicaId) -> int:
        """See `Replicas`."""
        replica = self._replicas.get(replica_id)
        return 0 if replica is None else replica.slot_count

    def ready_address(self, replica_id: ReplicaId) -> EngineAddress | None:
        """See `Replicas`."""
        replica = self._replicas.get(replica_id)
        return None if replica is None else replica.ready_address

    def residence(self, replica_id: ReplicaId) -> Residence | None:
        """See `Replicas`."""
        replica = self._replicas.get(replica_id)
        return None if replica is None else replica.residence

    def cards_given(self) -> frozenset[str]:
        """See `Replicas`."""
        held = (replica.observed.engine for replica in self._replicas.values() if replica.observed.phase in HOLDING)
        return frozenset(uuid for wish in held if wish.engine_kind != ATTACHED_KIND for uuid in wish.shape.card_uuids)

    def on_change(self, callback: Callable[[], None]) -> None:
        """See `Replicas`."""
        self._callbacks.append(callback)

    def on_death(self, callback: Callable[[ReplicaId, FailureKind], None]) -> None:
        """See `Replicas`."""
        self._death_callbacks.append(callback)

    def end_hung(self, replica_id: ReplicaId, why: str) -> None:
        """See `Replicas`."""
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.process is not None:
            replica.process.condemn(why)

    async def answers(self, replica_id: ReplicaId, *, token_seconds_max: float | None) -> bool:
        """See `Replicas`."""
        replica = self._replicas.get(replica_id)
        if replica is None or replica.process is None or self._session is None or not replica.process.address.url:
            return True
        address, wish = replica.process.address, replica.observed.engine
        try:
            url = address.url + "/health"
            async with self._session.get(url, headers=address.headers, timeout=_ANY_WORD, allow_redirects=False):
                pass  # any status is a word
            if token_seconds_max is None:
                return True
            assert replica.memory_plan is not None
            probe = self._engines[wish.engine_kind].probe(self._launch(replica, replica.memory_plan))
            status, answer = await ask(self._session, address, probe, token_seconds_max)
        except (aiohttp.ClientError, TimeoutError):
            return False
        return status != HTTPStatus.OK or has_token(answer)

    # The loop.

    async def run(self) -> None:
        """See `Replicas`."""
        async with aiohttp.ClientSession(trust_env=False, cookie_jar=aiohttp.DummyCookieJar()) as self._session:
            try:
                while True:
                    self._changed.clear()
                    await self._wait(self._act())
            finally:
                await self._stop_all()

    def _act(self) -> float | None:
        """Plans and takes the actions; when to plan again, on the clock, if nothing changes before."""
        observed = {replica_id: replica.observed for replica_id, replica in self._replicas.items()}
        step = plan(self._desired, observed, self._limits, self._clock.monotonic_seconds())
        for action in step.actions:
            match action:
                case Fetch(engine):
                    self._begin_fetch(engine)
                case Start(engine):
                    self._begin(self._replicas[engine.replica_id], Phase.STARTING, self._serve)
                case Stop(replica_id):
                    self._begin(self._replicas[replica_id], Phase.STOPPING, self._stop)
                case Refuse():
                    self._refuse(action)
                case Forget(replica_id):
                    del self._replicas[replica_id]
                case _:
                    assert_never(action)
        if step.actions:
            # Also wakes this loop: what was done may ask for more at once, as when a forgotten replica is fetched anew.
            self._announce()
        return step.wake_at_seconds

    async def _wait(self, wake_at_seconds: float | None) -> None:
        limit_seconds = None if wake_at_seconds is None else max(0.0, wake_at_seconds - self._clock.monotonic_seconds())
        # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                await self._changed.wait()

    # Work, one task a replica.

    def _begin_fetch(self, engine: DesiredEngine) -> None:
        replica = self._replicas.get(engine.replica_id)
        if replica is None:
            replica = self._replicas[engine.replica_id] = ReplicaRecord(ObservedReplica(engine, Phase.FETCHING))
        replica.fetched_bytes = 0
        self._begin(replica, Phase.FETCHING, self._fetch)

    def _begin(self, replica: ReplicaRecord, phase: Phase, work: Callable[[ReplicaRecord], Coroutine[Any, Any, None]]) -> None:
        earlier, replica.observed = replica.work, replace(replica.observed, phase=phase)
        if earlier is not None:
            earlier.cancel()
        wish = replica.observed.engine
        _log.info("engine_" + phase.value, replica_id=wish.replica_id, model_id=wish.model.model_id)
        replica.work = asyncio.create_task(self._after(earlier, replica, work))

    async def _after(
        self, earlier: asyncio.Task[None] | None, replica: ReplicaRecord, work: Callable[[ReplicaRecord], Coroutine[Any, Any, None]]
    ) -> None:
        """Never two pieces of work on one replica: the earlier one has let go of its process before the next begins."""
        cancelled = False
        while earlier is not None and not earlier.done():
            try:
                await asyncio.wait({earlier})
            except asyncio.CancelledError:
                # It is stopping an engine, within a bound; leaving it behind would leave the engine.
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        try:
            await work(replica)
        except Exception as error:  # noqa: BLE001 - a fault of ours must show as a failed replica, not as one that hangs
            _log.exception("engine_work_failed", replica_id=replica.observed.engine.replica_id)
            self._fail(replica, EngineFailedError(f"the agent itself failed here: {type(error).__name__}"))

    async def _fetch(self, replica: ReplicaRecord) -> None:
        def on_progress(present_bytes: int) -> None:
            replica.fetched_bytes = present_bytes
            self._announce()

        keep = frozenset(engine.model for engine in self._desired.engines)
        try:
            replica.path = await self._store.ensure(replica.observed.engine.model, keep=keep, on_progress=on_progress)
        except FetchFailedError as error:
            self._fail_fetch(replica, str(error), FailureKind.FETCH_FAILED, costly=False)
        except (FileMismatchError, ValueError) as error:
            kind = FailureKind.BAD_MODEL if isinstance(error, BadModelError) else FailureKind.FETCH_FAILED
            self._fail_fetch(replica, str(error), kind, costly=True)
        else:
            replica.observed = replace(replica.observed, fetch_failure_count=0)
            self._enter(replica, Phase.FETCHED)

    async def _serve(self, replica: ReplicaRecord) -> None:
        wish = replica.observed.engine
        engine = self._engines[wish.engine_kind]
        assert self._session is not None
        replica.memory_plan = plan_of(wish, self._ceilings.of(wish, engine.version), replica.leftover)
        launch = self._launch(replica, replica.memory_plan)
        replica.heeds_utilization = (
            len({engine.arguments(replace(launch, memory_utilization_percent=n)) for n in UTILIZATION_PERCENT_NOTCHES}) > 1
        )
        try:
            replica.process = await EngineProcess.start(engine, launch, self._environment, self._session, self._limits.lines_folder)
        except EngineFailedError as error:
            self._fail(replica, error)
            return
        died_of = FailureKind.KILLED  # by ourselves, unless it ends before
        try:
            replica.ready_at_seconds = self._clock.monotonic_seconds()
            replica.failure, replica.failure_kind = "", None
            self._enter(replica, Phase.READY)
            failure = await replica.process.wait()
            died_of = failure.kind
        finally:
            process, replica.process = replica.process, None
            # Those who wait for its answers hear of it first: clearing it away may take seconds.
            for callback in self._death_callbacks:
                callback(wish.replica_id, died_of)
            await process.stop()
        self._fail(replica, failure)

    @staticmethod
    def _launch(replica: ReplicaRecord, memory_plan: MemoryPlan) -> EngineLaunch:
        wish = replica.observed.engine
        assert replica.path is not None
        return EngineLaunch(
            model_id=wish.model.model_id,
            model_path=replica.path,
            slot_count=memory_plan.slot_count,
            context_length_tokens=memory_plan.context_length_tokens,
            shape=wish.shape,
            memory_utilization_percent=memory_plan.memory_utilization_percent,
            group=wish.group,
            attached_name=attached_name(wish.model.source),
        )

    async def _stop(self, replica: ReplicaRecord) -> None:
        # The work before this one has stopped its process on the way out.
        del self._replicas[replica.observed.engine.replica_id]
        self._announce()

    def _enter(self, replica: ReplicaRecord, phase: Phase) -> None:
        replica.observed = replace(replica.observed, phase=phase)
        wish = replica.observed.engine
        _log.info("engine_" + phase.value, replica_id=wish.replica_id, model_id=wish.model.model_id)
        self._announce()

    def _refuse(self, action: Refuse) -> None:
        wish, known = action.engine, self._replicas.get(action.engine.replica_id)
        given_up_for = known.observed.given_up if known is not None and known.observed.engine == wish else ""
        refused = ObservedReplica(wish, Phase.REFUSED, given_up=given_up_for, refusal=action.reason)
        self._replicas[wish.replica_id] = ReplicaRecord(refused, failure=action.reason, failure_kind=action.kind)
        _log.warning("engine_refused", replica_id=wish.replica_id, model_id=wish.model.model_id, kind=action.kind, reason=action.reason)

    def _fail_fetch(self, replica: ReplicaRecord, failure: str, kind: FailureKind, *, costly: bool) -> None:
        observed = failed_fetch(replica.observed, self._clock.monotonic_seconds(), costly=costly)
        self._note_failure(replica, observed, failure, kind)

    def _fail(self, replica: ReplicaRecord, failure: EngineFailedError) -> None:
        """Its engine failed: it is given less next time, given up, or it crashed."""
        now_seconds, words, tried = self._clock.monotonic_seconds(), str(failure), replica.memory_plan
        served_since, replica.ready_at_seconds = replica.ready_at_seconds, None
        leftover, replica.leftover = replica.leftover, None
        short = failure.shortage is not None and tried is not None
        following = self._after_shortage(replica, failure, leftover, served=served_since is not None) if short else None
        if following is not None:
            observed, more_words = following
        else:
            observed = crashed(replica.observed, now_seconds, 0.0 if served_since is None else now_seconds - served_since, failure.kind)
            wait_ms = (observed.retry_at_seconds - now_seconds) * 1000
            more_words = "\n" + breaker_words(observed.crashes, self._clock.unix_ms() + wait_ms) if observed.crashes.is_open else ""
        self._note_failure(replica, observed, words + more_words, failure.kind)

    def _after_shortage(
        self, replica: ReplicaRecord, failure: EngineFailedError, leftover: Leftover | None, *, served: bool
    ) -> tuple[ObservedReplica, str] | None:
        """What becomes of one that ran out of memory, in words too; None where that is a crash like others.

        One that had served gives up its share of a card's memory at most: a request may have brought it down, and must not take slots or
        context from the others. What happens beside others' memory (`leftover`) tells nothing of what the model needs.
        """
        tried, now_seconds = replica.memory_plan, self._clock.monotonic_seconds()
        assert tried is not None
        assert failure.shortage is not None
        if failure.shortage is Shortage.OTHERS:
            replica.leftover = None if served else beside_others(leftover, tried, failure.free_percent)
            if replica.leftover is None:
                return None
            words = f"others hold memory that {tried.words} would take; next: {replica.leftover.percent} % of memory"
            return stepped_down(replica.observed, now_seconds), "\n" + words
        if leftover is not None:
            return None
        lower = self._lower(replica, tried, failure.shortage, share_only=served)
        if lower is not None:
            replica.memory_plan = lower
            return stepped_down(replica.observed, now_seconds), f"\nout of memory with {tried.words}; next: {lower.words}"
        if served:
            return None
        return given_up(replica.observed, f"out of memory even with {tried.words}; it needs a bigger card, or a smaller model"), ""

    def _lower(self, replica: ReplicaRecord, failed: MemoryPlan, shortage: Shortage, *, share_only: bool) -> MemoryPlan | None:
        """The next plan that its engine can tell from the one that failed, remembered; None where there is none."""
        wish = replica.observed.engine
        engine = self._engines[wish.engine_kind]
        command = engine.arguments(self._launch(replica, failed))
        ceiling, lower = self._ceilings.of(wish, engine.version), failed
        # The same again: what is left to lower is not this node's to lower, as in a group.
        while (lowered := step_down(ceiling, lower, shortage)) is not None and lowered != ceiling:
            ceiling, lower = lowered, plan_of(wish, lowered)
            if share_only and lower.memory_utilization_percent == failed.memory_utilization_percent:
                return None
            if engine.arguments(self._launch(replica, lower)) != command:
                self._ceilings.lower(wish, engine.version, ceiling)
                return lower
        return None

    def _note_failure(self, replica: ReplicaRecord, observed: ObservedReplica, failure: str, kind: FailureKind) -> None:
        replica.observed, replica.failure, replica.failure_kind = observed, failure, kind
        wish = observed.engine
        _log.warning("engine_failed", replica_id=wish.replica_id, model_id=wish.model.model_id, kind=kind, failure=failure)
        self._announce()

    async def _stop_all(self) -> None:
        work = {replica.work for replica in self._replicas.values() if replica.work is not None}
        for task in work:
            task.cancel()
        if work:
            await asyncio.wait(work)
        self._replicas.clear()

    def _announce(self) -> None:
        self._changed.set()
        for callback in self._callbacks:
            callback()
