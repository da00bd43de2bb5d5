"""The agent's composition root: builds the parts of one node, runs them, and takes them down in order.

Here `supervisor`, `attempts`, `watchdog`, `readings`, `resting`, `report` and `link` are made and joined; `agent_life` runs them. After a
leave that was heard the state folder is removed here; `--force` is `command`'s. It must not know frames, nor how an engine is run.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import structlog
from aiohttp import ClientSession

from potluck_node.agent_life import Agent
from potluck_node.attached_servers import AttachedServers
from potluck_node.attempts import Attempts
from potluck_node.ceilings import FILE_NAME as CEILINGS_FILE
from potluck_node.ceilings import Ceilings, machine_words
from potluck_node.control import AgentStatus, read_control, write_control
from potluck_node.credentials import Credentials
from potluck_node.domain.attached import parse_attached
from potluck_node.domain.card_limit import capped, card_percents_max
from potluck_node.domain.hours import parse_window
from potluck_node.domain.plan import LocalLimits
from potluck_node.domain.rest import Rules
from potluck_node.engine_exchange import EngineConnections
from potluck_node.engine_session import engine_session
from potluck_node.engines import last_lines
from potluck_node.engines.registry import available_engines
from potluck_node.group_offer import group_offer
from potluck_node.heat import Heat, heat_of
from potluck_node.identity_store import StateFolder
from potluck_node.line_watch import LineWatch
from potluck_node.link import Link
from potluck_node.model_store.own_folder import own_folder
from potluck_node.model_store.store import ModelStore
from potluck_node.no_replicas import NoReplicas
from potluck_node.peer_measurement import PeerMeasuring
from potluck_node.probe.engine_remains import children_of_this_process
from potluck_node.probe.inventory import take_inventory
from potluck_node.probe.local_zone import local_zone
from potluck_node.readings import Readings
from potluck_node.replicas import Replicas
from potluck_node.report import NodeReport
from potluck_node.rest_facts import RestFacts
from potluck_node.resting import Resting
from potluck_node.settings import Settings
from potluck_node.supervisor import EngineSupervisor
from potluck_node.watchdog import Watchdog
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EngineState, GoodbyeReason, Inventory, ModelId, NodeState, SessionId

_JITTER: Final = random.SystemRandom().random

_log = structlog.get_logger()


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
        whole = await _inventory_of(settings, sorted(engines))
        inventory = capped(whole, settings.card_memory_bytes_max)
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
            settings.card_memory_bytes_max,
            card_percents_max(whole.accelerators, settings.card_memory_bytes_max),
            folder.path / last_lines.FOLDER_NAME if settings.keep_engine_lines else None,
            # Until it is decided that the node serves.
            paused=True,
        )
        ceilings = Ceilings(folder.path / CEILINGS_FILE, machine_words(inventory))
        supervisor = EngineSupervisor(engines=engines, store=store, limits=limits, ceilings=ceilings, clock=clock, environment=environment)
        async with agent_of(
            settings, folder, supervisor, attached, inventory=inventory, clock=clock, environment=environment, show=show
        ) as agent:
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
            settings,
            folder,
            NoReplicas(),
            AttachedServers(()),
            inventory=inventory,
            clock=SystemClock(),
            environment={},
            show=lambda _: None,
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
    environment: Mapping[str, str],
    show: Callable[[AgentStatus], None],
) -> AsyncIterator[Agent]:
    """The parts of one node, put together."""
    credentials = Credentials(folder, clock, _JITTER)
    if settings.url is not None:
        await credentials.move_to(settings.url)
    async with engine_session() as http:
        work = _work_of(settings, folder, replicas, http=http, clock=clock, state=lambda: report.state)
        peers, line, report = _voice_of(
            settings, folder, replicas, attached, work, credentials=credentials, inventory=inventory, clock=clock
        )
        link = Link(
            credentials=credentials,
            attempts=work.attempts,
            replicas=replicas,
            peers=peers,
            report=report,
            clock=clock,
            jitter=_JITTER,
            upload_bytes_per_second_max=settings.upload_bytes_per_second_max,
        )
        work.heat.changed = link.report_now
        facts, resting = _resting_of(settings, work, replicas, clock=clock, environment=environment)
        watchdog = Watchdog(attempts=work.attempts, replicas=replicas, clock=clock)
        chores = {"heat": work.heat.run, "line": line.run, "peers": peers.run, "readings": work.readings.run, "use": facts.run}
        agent = Agent(
            folder=folder,
            settings=settings,
            replicas=replicas,
            attempts=work.attempts,
            chores=chores | {"watchdog": watchdog.run},
            link=link,
            report=report,
            resting=resting,
            show=show,
        )
        # Before the first hello: it says what the owner has said.
        resting.heed(read_control(folder.path))
        agent.take_note()
        async with attached.watched(link.introduce_again):
            yield agent


@dataclass(frozen=True, slots=True)
class _Work:
    """What runs on the engines, what is read off them, and how much their cards' heat leaves of them."""

    attempts: Attempts
    readings: Readings
    heat: Heat


def _work_of(
    settings: Settings, folder: StateFolder, replicas: Replicas, *, http: ClientSession, clock: Clock, state: Callable[[], NodeState]
) -> _Work:
    attempts = Attempts(
        replicas=replicas,
        connections=EngineConnections(),
        clock=clock,
        node_state=state,
        slot_count_max=settings.slot_count_max,
        slots_now=lambda replica_id, slot_count: heat.slots(replica_id, slot_count),  # noqa: PLW0108 - it is made below
    )
    readings = Readings(replicas, http, heard=attempts.watches.heard)
    heat = heat_of(settings, folder.path, readings, replicas, clock)
    return _Work(attempts, readings, heat)


def _voice_of(
    settings: Settings,
    folder: StateFolder,
    replicas: Replicas,
    attached: AttachedServers,
    work: _Work,
    *,
    credentials: Credentials,
    inventory: Inventory,
    clock: Clock,
) -> tuple[PeerMeasuring, LineWatch, NodeReport]:
    """What the node measures of its site and its line, and what it says of itself."""
    peers = PeerMeasuring(credentials.identity.node_id, inventory.group_offer, clock)
    line = LineWatch(
        credentials, folder.path, clock, _JITTER, quiet=lambda: _line_is_quiet(settings, report.state, work.attempts, replicas)
    )
    report = NodeReport(
        credentials=credentials,
        session_id=SessionId(secrets.token_hex(16)),
        inventory=inventory,
        replicas=replicas,
        attempts=work.attempts,
        readings=work.readings,
        heat=work.heat,
        peers=peers,
        line=line,
        attached=attached,
        cache_dir=settings.cache_dir,
        slot_count_max=settings.slot_count_max,
        clock=clock,
    )
    return peers, line, report


def _resting_of(
    settings: Settings, work: _Work, replicas: Replicas, *, clock: Clock, environment: Mapping[str, str]
) -> tuple[RestFacts, Resting]:
    """The owner's word over the node: what it is decided on, and who carries it out."""
    facts = RestFacts(
        clock=clock,
        environment=environment,
        watches_use=settings.idle_minutes is not None,
        cards=lambda: work.readings.cards,
        cards_given=replicas.cards_given,
        others=work.heat.reasons,
    )
    hours = tuple(parse_window(words) for words in settings.hours)
    resting = Resting(
        rules=Rules(hours, settings.idle_minutes, local_zone(environment), others_expected=bool(settings.attach_urls)),
        facts=facts.facts,
        attempts=work.attempts,
        replicas=replicas,
        clock=clock,
        drain_seconds=settings.drain_seconds,
        children=children_of_this_process,
    )
    return facts, resting


def _line_is_quiet(settings: Settings, state: NodeState, attempts: Attempts, replicas: Replicas) -> bool:
    """Whether a measurement would disturb nothing, and nothing it: no answer on its way, no model, no rest that the owner asked for.

    An owner who limits the upload does not have it filled for two seconds.
    """
    if settings.upload_bytes_per_second_max is not None:
        return False
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


def _not_heard() -> PotluckError:
    return PotluckError(
        ErrorCode.COORDINATOR_UNAVAILABLE,
        "The coordinator could not be told, so this node is still one of its pool's. Try again when it is reachable, or remove the key "
        "from this machine anyway with `potluck node leave --force`.",
    )
