"""The agent's composition root: builds the parts of one node, runs them, and takes them down in order.

Decides what the owner's words (pause, resume, leave, stop) do to the parts, and in which order things end: no new attempts, those under way
finish within the owner's limit, the coordinator hears a goodbye, engines stop. After a leave that was heard the state folder is removed
here; `--force` is `command`'s. Here `supervisor`, `attempts`, `watchdog`, `readings`, `report` and `link` are made and joined. It must not
know frames, nor how an engine is run.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import structlog

from potluck_node.attached_servers import AttachedServers
from potluck_node.attempts import Attempts, engine_session
from potluck_node.ceilings import FILE_NAME as CEILINGS_FILE
from potluck_node.ceilings import Ceilings, machine_words
from potluck_node.control import POLL_SECONDS, AgentStatus, read_control, remove_status, write_control, write_status
from potluck_node.credentials import Credentials
from potluck_node.domain.attached import parse_attached
from potluck_node.domain.plan import LocalLimits
from potluck_node.domain.session import Phase
from potluck_node.engines import last_lines
from potluck_node.engines.registry import available_engines
from potluck_node.group_offer import group_offer
from potluck_node.identity_store import StateFolder
from potluck_node.line_watch import LineWatch
from potluck_node.link import Link
from potluck_node.model_store.own_folder import own_folder
from potluck_node.model_store.store import ModelStore
from potluck_node.peer_measurement import PeerMeasuring
from potluck_node.probe.inventory import take_inventory
from potluck_node.readings import Readings
from potluck_node.replicas import Replicas
from potluck_node.report import NodeReport
from potluck_node.settings import Settings
from potluck_node.supervisor import EngineSupervisor
from potluck_node.watchdog import Watchdog
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EngineState, GoodbyeReason, Inventory, ModelId, NodeState, SessionId

LEAVE_LINK_SECONDS: Final = 15.0
"""How long leaving waits for a link that is not up."""
DRAIN_LOOK_SECONDS: Final = 0.05

_log = structlog.get_logger()


class Agent:
    """A node's parts at work. Made by `agent_of`.

    Args:
        folder: locked by the caller.
        settings: the owner's.
        replicas: the engines.
        attempts: what runs on them.
        chores: what else goes on beside them, by name, each without an end.
        link: to the coordinator.
        report: the node's voice.
        show: called every second with what the owner should see.
    """

    def __init__(
        self,
        *,
        folder: StateFolder,
        settings: Settings,
        replicas: Replicas,
        attempts: Attempts,
        chores: Mapping[str, Callable[[], Coroutine[Any, Any, None]]],
        link: Link,
        report: NodeReport,
        show: Callable[[AgentStatus], None],
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._replicas = replicas
        self._attempts = attempts
        self._chores = chores
        self._link = link
        self._report = report
        self._show = show
        self._wanted_end: GoodbyeReason | None = None
        self._end_wanted = asyncio.Event()
        self._hurry = asyncio.Event()
        self._rest: asyncio.Task[None] | None = None
        self._status_written = True

    def stop(self, reason: GoodbyeReason) -> None:
        """Asks for the end; asking again means at once. Who leaves while the agent stops leaves for good."""
        if self._wanted_end is not None:
            self._hurry.set()
        if self._wanted_end is not GoodbyeReason.LEAVING:
            self._wanted_end = reason
        self._end_wanted.set()

    async def run(self) -> GoodbyeReason | None:
        """Works until `stop`, or until the owner's `leave`; the goodbye that the coordinator heard.

        Raises:
            PotluckError: as `Link.run`.
        """
        parts = [
            asyncio.create_task(self._replicas.run(), name="engines"),
            asyncio.create_task(self._link.run(), name="link"),
            asyncio.create_task(self._watch_owner(), name="owner"),
            *(asyncio.create_task(chore(), name=name) for name, chore in self._chores.items()),
        ]
        ending = asyncio.create_task(self._end_wanted.wait(), name="ending")
        try:
            done, _ = await asyncio.wait({*parts, ending}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                # A part that ends before it was asked to has failed, and its failure is the agent's.
                task.result()
            return await self._end(link=parts[1])
        finally:
            for task in [*parts, ending, *([self._rest] if self._rest else [])]:
                task.cancel()
            await asyncio.gather(*parts, ending, return_exceptions=True)
            await self._attempts.close()
            remove_status(self._folder.path)

    async def _end(self, link: asyncio.Task[None]) -> GoodbyeReason | None:
        _log.info("stopping", goodbye=self._wanted_end)
        self._report.state = NodeState.DRAINING
        self._link.report_now()
        if self._wanted_end is GoodbyeReason.LEAVING:
            await self._until(lambda: self._link.session.phase is Phase.SERVING or link.done(), LEAVE_LINK_SECONDS)
            if link.done():
                link.result()
        await self._until(lambda: not self._attempts.busy, self._settings.drain_seconds)
        # Read only now: the owner's `leave` may have come during the wait.
        reason = self._wanted_end or GoodbyeReason.STOPPING
        heard = await self._link.say_goodbye(reason)
        _log.info("goodbye_said", goodbye=reason, heard=heard)
        return reason if heard else None

    async def _watch_owner(self) -> None:
        """Reads what the owner wants and writes what there is to see."""
        while True:
            control = read_control(self._folder.path)
            if control.leaving:
                self.stop(GoodbyeReason.LEAVING)
                return
            if control.paused != (self._report.state is NodeState.PAUSED):
                self._set_paused(control.paused)
            status = replace(
                self._report.status(self._link.session, self._link.trouble), engine_lines_are_kept=self._settings.keep_engine_lines
            )
            self._write_status(status)
            self._show(status)
            await asyncio.sleep(POLL_SECONDS)

    def _write_status(self, status: AgentStatus) -> None:
        """A full disk costs the owner's view of the node, never the node; it is logged once until it is over."""
        try:
            write_status(self._folder.path, status)
        except OSError as error:
            if self._status_written:
                _log.warning("status_not_written", reason=error.strerror or type(error).__name__)
            self._status_written = False
        else:
            self._status_written = True

    def _set_paused(self, paused: bool) -> None:
        _log.info("paused" if paused else "resumed")
        self._report.state = NodeState.PAUSED if paused else NodeState.SERVING
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if paused:
            self._rest = asyncio.create_task(self._rest_engines(), name="rest")
        else:
            self._replicas.set_paused(False)
        self._link.report_now()

    async def _rest_engines(self) -> None:
        """Answers under way may finish within the owner's limit; then the machine is the owner's."""
        await self._until(lambda: not self._attempts.busy, self._settings.drain_seconds)
        self._replicas.set_paused(True)

    async def _until(self, condition: Callable[[], bool], limit_seconds: float) -> None:
        """Waits for the condition, within the limit and the owner's patience."""
        for _ in range(int(limit_seconds / DRAIN_LOOK_SECONDS)):
            if condition() or self._hurry.is_set():
                return
            await asyncio.sleep(DRAIN_LOOK_SECONDS)


async def run_agent(
    settings: Settings, *, environment: Mapping[str, str], show: Callable[[AgentStatus], None], started: Callable[[Agent], None]
) -> None:
    """Runs the node of a state folder until it is stopped; after a goodbye for good that was heard, the folder is gone.

    Args:
        settings: the owner's.
        environment: what engines and package clients may see of ours.
        show: called every second.
        started: gets the agent, to stop it.

    Raises:
        PotluckError: NOT_FOUND for a folder that has not joined, ALREADY_EXISTS while another agent runs on it, COORDINATOR_UNAVAILABLE
            where `url` does not answer or a leave was not heard, and as `Link.run`.
    """
    folder = StateFolder(settings.state_dir)
    clock = SystemClock()
    folder.identity()
    with folder.lock(), own_folder(settings.cache_dir) as models_folder:
        if models_folder != settings.cache_dir:
            _log.warning("model_cache_in_use", by="another agent of this machine", models_kept_in=str(models_folder))
        # A wish to leave that was not carried out belongs to an earlier run.
        write_control(folder.path, leaving=False)
        attached = AttachedServers([parse_attached(url) for url in settings.attach_urls])
        engines = available_engines(settings, attached)
        inventory = await _inventory_of(settings, sorted(engines))
        store = ModelStore(models_folder, disk_budget_bytes=settings.disk_budget_bytes, environment=environment)
        models_allowed = frozenset(ModelId(model_id) for model_id in settings.models_allowed)
        if not settings.keep_engine_lines:
            last_lines.forget(folder.path)
        limits = LocalLimits(
            frozenset(engines),
            models_allowed,
            settings.disk_budget_bytes,
            settings.memory_budget_bytes,
            inventory.group_offer,
            folder.path / last_lines.FOLDER_NAME if settings.keep_engine_lines else None,
            paused=read_control(folder.path).paused,
        )
        ceilings = Ceilings(folder.path / CEILINGS_FILE, machine_words(inventory))
        supervisor = EngineSupervisor(engines=engines, store=store, limits=limits, ceilings=ceilings, clock=clock, environment=environment)
        async with agent_of(settings, folder, supervisor, attached, inventory=inventory, clock=clock, show=show) as agent:
            started(agent)
            heard = await agent.run()
        if read_control(folder.path).leaving:
            if heard is not GoodbyeReason.LEAVING:
                write_control(folder.path, leaving=False)
                raise _not_heard()
            folder.remove()


async def leave_without_agent(settings: Settings) -> None:
    """Says the goodbye for good for a node whose agent is not running, and removes the folder; raises PotluckError as `run_agent`."""
    folder = StateFolder(settings.state_dir)
    folder.identity()
    with folder.lock():
        inventory = await _inventory_of(settings, ())
        async with agent_of(
            settings, folder, _NoReplicas(), AttachedServers(()), inventory=inventory, clock=SystemClock(), show=lambda _: None
        ) as agent:
            agent.stop(GoodbyeReason.LEAVING)
            if await agent.run() is not GoodbyeReason.LEAVING:
                raise _not_heard()
        folder.remove()


@asynccontextmanager
async def agent_of(
    settings: Settings,
    folder: StateFolder,
    replicas: Replicas,
    attached: AttachedServers,
    *,
    inventory: Inventory,
    clock: Clock,
    show: Callable[[AgentStatus], None],
) -> AsyncIterator[Agent]:
    """The parts of one node, put together."""
    jitter = random.SystemRandom().random
    credentials = Credentials(folder, clock, jitter)
    if settings.url is not None:
        await credentials.move_to(settings.url)
    async with engine_session() as http:
        attempts = Attempts(
            replicas=replicas, http=http, clock=clock, node_state=lambda: report.state, slot_count_max=settings.slot_count_max
        )
        readings = Readings(replicas, http, heard=attempts.watches.heard)
        peers = PeerMeasuring(credentials.identity.node_id, inventory.group_offer, clock)
        line = LineWatch(credentials, folder.path, clock, jitter, quiet=lambda: _line_is_quiet(report.state, attempts, replicas))
        report = NodeReport(
            credentials=credentials,
            session_id=SessionId(secrets.token_hex(16)),
            inventory=inventory,
            replicas=replicas,
            attempts=attempts,
            readings=readings,
            peers=peers,
            line=line,
            attached=attached,
            cache_dir=settings.cache_dir,
            slot_count_max=settings.slot_count_max,
            clock=clock,
        )
        if read_control(folder.path).paused:
            report.state = NodeState.PAUSED
        link = Link(credentials=credentials, attempts=attempts, replicas=replicas, peers=peers, report=report, clock=clock, jitter=jitter)
        watchdog = Watchdog(attempts=attempts, replicas=replicas, clock=clock)
        async with attached.watched(link.introduce_again):
            yield Agent(
                folder=folder,
                settings=settings,
                replicas=replicas,
                attempts=attempts,
                chores={"line": line.run, "peers": peers.run, "readings": readings.run, "watchdog": watchdog.run},
                link=link,
                report=report,
                show=show,
            )


def _line_is_quiet(state: NodeState, attempts: Attempts, replicas: Replicas) -> bool:
    """Whether a measurement would disturb nothing, and nothing it: no answer on its way, no model, no rest that the owner asked for."""
    fetching = any(status.state is EngineState.FETCHING for status in replicas.statuses())
    return state is NodeState.SERVING and not attempts.busy and not fetching


async def _inventory_of(settings: Settings, engine_kinds: Iterable[str]) -> Inventory:
    """What the machine has, and what its owner offers of it."""
    return replace(
        await asyncio.to_thread(take_inventory, settings.cache_dir),
        engine_kinds=tuple(engine_kinds),
        group_offer=group_offer(settings),
        memory_budget_bytes=settings.memory_budget_bytes or 0,
    )


class _NoReplicas:
    """A node that runs nothing, because it is only here to leave."""

    def set_desired(self, desired: object) -> None: ...
    def set_paused(self, paused: bool) -> None: ...
    def on_change(self, callback: Callable[[], None]) -> None: ...
    def on_death(self, callback: object) -> None: ...
    def end_hung(self, replica_id: object, why: object) -> None: ...

    def statuses(self) -> tuple[()]:
        return ()

    def ready_address(self, _replica_id: object) -> None:
        return None

    def residence(self, _replica_id: object) -> None:
        return None

    def cards_given(self) -> frozenset[str]:
        return frozenset()

    async def answers(self, replica_id: object, *, token_seconds_max: object) -> bool:  # noqa: ARG002 - as the protocol names it
        return True

    async def run(self) -> None:
        await asyncio.Event().wait()


def _not_heard() -> PotluckError:
    return PotluckError(
        ErrorCode.COORDINATOR_UNAVAILABLE,
        "The coordinator could not be told, so this node is still one of its pool's. Try again when it is reachable, or remove the key "
        "from this machine anyway with `potluck node leave --force`.",
    )
