"""Runs the engines that the directory wishes and the owner allows: observe, plan, act, and again after every change.

`domain.plan` says what to do; files come from `model_store.store`, engines run as `engines.process`. Decides that a replica has at most one
piece of work at a time (a fetch, a start, a running engine, or a stop), and which failures are costly to repeat. It must not know the link;
it implements `replicas.Replicas` for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, assert_never

import aiohttp
import structlog

from potluck_node.domain.plan import (
    Fetch,
    Forget,
    LocalLimits,
    ObservedReplica,
    Phase,
    Refuse,
    Start,
    Stop,
    failures_in_a_row,
    plan,
)
from potluck_node.engines.base import Engine, EngineAddress, EngineLaunch
from potluck_node.engines.process import EngineFailedError, EngineProcess
from potluck_node.model_store.download import FetchFailedError
from potluck_node.model_store.store import ModelStore
from potluck_node.model_store.verification import FileMismatchError
from potluck_protocol.clock import Clock
from potluck_protocol.values import DesiredEngine, DesiredState, EngineState, EngineStatus, ReplicaId

_log = structlog.get_logger()

_STATE_OF_PHASE: Final = {
    Phase.FETCHING: EngineState.FETCHING,
    Phase.FETCHED: EngineState.STARTING,
    Phase.STARTING: EngineState.STARTING,
    Phase.READY: EngineState.READY,
    Phase.FAILED: EngineState.BACKING_OFF,
    Phase.REFUSED: EngineState.REFUSED,
    Phase.STOPPING: EngineState.STOPPING,
}


@dataclass(slots=True, eq=False)
class _Replica:
    """One replica's present. `work` is the only task that changes it, apart from the supervisor's own actions."""

    observed: ObservedReplica
    work: asyncio.Task[None] | None = None
    path: Path | None = None
    process: EngineProcess | None = None
    ready_at_seconds: float | None = None
    fetched_bytes: int = 0
    failure: str = ""


class EngineSupervisor:
    """The engines of this node; `replicas.Replicas` for the link.

    Args:
        engines: what this node can run, by kind.
        store: where model files come from.
        limits: the owner's. `set_paused` changes `paused` later.
        clock: time.
        environment: the agent's, of which engines see a part.
    """

    def __init__(
        self, *, engines: Mapping[str, Engine], store: ModelStore, limits: LocalLimits, clock: Clock, environment: Mapping[str, str]
    ) -> None:
        self._engines = dict(engines)
        self._store = store
        self._limits = limits
        self._clock = clock
        self._environment = dict(environment)
        self._desired = DesiredState()
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._changed = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None

    # What the link asks.

    def set_desired(self, desired: DesiredState) -> None:
        """See `Replicas`."""
        self._desired = desired
        self._changed.set()

    def set_paused(self, paused: bool) -> None:
        """While paused nothing is fetched or started, and running engines are stopped, so that memory and cards are the owner's again."""
        self._limits = replace(self._limits, paused=paused)
        self._changed.set()

    def statuses(self) -> tuple[EngineStatus, ...]:
        """See `Replicas`."""
        return tuple(self._status(replica) for replica in self._replicas.values())

    def ready_address(self, replica_id: ReplicaId) -> EngineAddress | None:
        """See `Replicas`."""
        replica = self._replicas.get(replica_id)
        if replica is None or replica.process is None or replica.observed.phase is not Phase.READY:
            return None
        return replica.process.address

    def on_change(self, callback: Callable[[], None]) -> None:
        """See `Replicas`."""
        self._callbacks.append(callback)

    def _status(self, replica: _Replica) -> EngineStatus:
        wish, phase = replica.observed.engine, replica.observed.phase
        engine = self._engines.get(wish.engine_kind)
        fetching = phase is Phase.FETCHING
        return EngineStatus(
            replica_id=wish.replica_id,
            model_id=wish.model.model_id,
            state=_STATE_OF_PHASE[phase],
            engine_kind=wish.engine_kind,
            engine_version=engine.version if engine else "",
            slot_count=wish.slot_count,
            context_length_tokens=wish.context_length_tokens,
            # A wheel is not exactly as long as the file in it; a bar never shows more than all of it.
            fetched_bytes=min(replica.fetched_bytes, wish.model.size_bytes) if fetching else wish.model.size_bytes if replica.path else 0,
            fetch_total_bytes=wish.model.size_bytes,
            failure=replica.failure,
            endpoints=engine.endpoints if engine else (),
        )

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
                case Refuse(engine, reason):
                    refused = ObservedReplica(engine, Phase.REFUSED, refusal=reason)
                    self._replicas[engine.replica_id] = _Replica(refused, failure=reason)
                    _log.warning("engine_refused", replica_id=engine.replica_id, model_id=engine.model.model_id, reason=reason)
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
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), limit_seconds)

    # Work, one task a replica.

    def _begin_fetch(self, engine: DesiredEngine) -> None:
        replica = self._replicas.get(engine.replica_id)
        if replica is None:
            replica = self._replicas[engine.replica_id] = _Replica(ObservedReplica(engine, Phase.FETCHING))
        replica.fetched_bytes = 0
        self._begin(replica, Phase.FETCHING, self._fetch)

    def _begin(self, replica: _Replica, phase: Phase, work: Callable[[_Replica], Coroutine[Any, Any, None]]) -> None:
        earlier, replica.observed = replica.work, replace(replica.observed, phase=phase)
        if earlier is not None:
            earlier.cancel()
        wish = replica.observed.engine
        _log.info("engine_" + phase.value, replica_id=wish.replica_id, model_id=wish.model.model_id)
        replica.work = asyncio.create_task(self._after(earlier, replica, work))

    async def _after(
        self, earlier: asyncio.Task[None] | None, replica: _Replica, work: Callable[[_Replica], Coroutine[Any, Any, None]]
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
            self._fail(replica, f"the agent itself failed here: {type(error).__name__}")

    async def _fetch(self, replica: _Replica) -> None:
        def on_progress(present_bytes: int) -> None:
            replica.fetched_bytes = present_bytes
            self._announce()

        keep = frozenset(engine.model.sha256 for engine in self._desired.engines)
        try:
            replica.path = await self._store.ensure(replica.observed.engine.model, keep=keep, on_progress=on_progress)
        except FetchFailedError as error:
            self._fail(replica, str(error))
        except (FileMismatchError, ValueError) as error:
            self._fail(replica, str(error), costly=True)
        else:
            self._enter(replica, Phase.FETCHED)

    async def _serve(self, replica: _Replica) -> None:
        wish = replica.observed.engine
        assert replica.path is not None
        assert self._session is not None
        launch = EngineLaunch(wish.model.model_id, replica.path, wish.slot_count, wish.context_length_tokens)
        try:
            replica.process = await EngineProcess.start(self._engines[wish.engine_kind], launch, self._environment, self._session)
        except EngineFailedError as error:
            self._fail(replica, str(error))
            return
        try:
            replica.ready_at_seconds = self._clock.monotonic_seconds()
            replica.failure = ""
            self._enter(replica, Phase.READY)
            ending = await replica.process.wait()
        finally:
            process, replica.process = replica.process, None
            await process.stop()
        self._fail(replica, ending)

    async def _stop(self, replica: _Replica) -> None:
        # The work before this one has stopped its process on the way out.
        del self._replicas[replica.observed.engine.replica_id]
        self._announce()

    def _enter(self, replica: _Replica, phase: Phase) -> None:
        replica.observed = replace(replica.observed, phase=phase)
        wish = replica.observed.engine
        _log.info("engine_" + phase.value, replica_id=wish.replica_id, model_id=wish.model.model_id)
        self._announce()

    def _fail(self, replica: _Replica, failure: str, *, costly: bool = False) -> None:
        now_seconds = self._clock.monotonic_seconds()
        ready_for_seconds = 0.0 if replica.ready_at_seconds is None else now_seconds - replica.ready_at_seconds
        replica.ready_at_seconds = None
        replica.failure = failure
        replica.observed = replace(
            replica.observed,
            phase=Phase.FAILED,
            failure_count=failures_in_a_row(replica.observed.failure_count, ready_for_seconds),
            failed_at_seconds=now_seconds,
            failure_was_costly=costly,
        )
        wish = replica.observed.engine
        _log.warning("engine_failed", replica_id=wish.replica_id, model_id=wish.model.model_id, failure=failure)
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
