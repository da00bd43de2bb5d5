"""`python -m tests.support.simulated_agents NODES.json`: many agents in one process, each with a link of its own, told what to do by lines.

The link is the agent's own (`potluck_node.link`): it dials, beats, fences itself and dials again as every agent does, over mutual TLS and
one connection each. What stands in is what the link tells of: a box with two cards and one ready engine, whose cards' power and heat change
with every beat, as real ones do. One JSON object comes in on a line of standard input, and one goes out for it.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import structlog

from potluck_node.attempts import Attempts
from potluck_node.domain.gateways import Ways
from potluck_node.domain.session import Phase
from potluck_node.engine_exchange import EngineConnections
from potluck_node.gateway_ways import GatewayWays
from potluck_node.knocking import knock
from potluck_node.link import Link
from potluck_node.no_replicas import NoReplicas
from potluck_node.peer_measurement import PeerMeasuring
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.channels import LINK_CHANNEL_OPTIONS, PATIENT_LINK_CHANNEL_OPTIONS
from potluck_protocol.clock import SystemClock
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.errors import PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import (
    Accelerator,
    AttemptId,
    Endpoint,
    EngineState,
    EngineStatus,
    GoodbyeReason,
    Heartbeat,
    Hello,
    Inventory,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
    Welcome,
)
from potluck_protocol.version import PROTOCOL_VERSION

CARD_BYTES = 24 << 30


@dataclass(frozen=True, slots=True)
class EnrolledKey:
    """What a node shows at the link port."""

    node_id: str
    private_key_pem: str
    certificate_pem: str


@dataclass(frozen=True, slots=True)
class Nodes:
    """Everything that one process of agents needs."""

    target: str
    ca_certificate_pem: str
    keys: tuple[EnrolledKey, ...]

    def write(self, path: Path) -> Path:
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Nodes:
        found = json.loads(path.read_text())
        return cls(found["target"], found["ca_certificate_pem"], tuple(EnrolledKey(**key) for key in found["keys"]))


class RememberedWays(GatewayWays):
    """The ways to the gateways, kept in memory alone."""

    def _read(self) -> Ways:
        return Ways(self._connection().link_target)

    def _write(self) -> None: ...


class HeldCredentials:
    """In the place of `credentials.Credentials`: the key and the certificate come from the caller, and last."""

    def __init__(self, nodes: Nodes, key: EnrolledKey) -> None:
        self._nodes = nodes
        self._key = key
        host, port = nodes.target.rsplit(":", 1)
        connection = ConnectionDocument(PROTOCOL_VERSION, "pool", 0, int(port), host, nodes.ca_certificate_pem)
        self.gateways = RememberedWays(Path(), lambda: connection, SystemClock())

    async def make_ready(self, *, knocks: bool) -> None:
        if knocks:
            await knock(self.gateways.target)

    async def find_coordinator(self) -> None: ...

    def renewal_due(self) -> bool:
        return False

    def open_channel(self, *, patient: bool) -> grpc.aio.Channel:
        key = self._key
        credentials = grpc.ssl_channel_credentials(
            self._nodes.ca_certificate_pem.encode(), key.private_key_pem.encode(), key.certificate_pem.encode()
        )
        options = PATIENT_LINK_CHANNEL_OPTIONS if patient else LINK_CHANNEL_OPTIONS
        return grpc.aio.secure_channel(self.gateways.target, credentials, options=options)


class BoxReport:
    """In the place of `report.NodeReport`."""

    def __init__(self, node_id: str, draw: random.Random) -> None:
        self.beat_count = 0
        self.is_steady = False
        self._node_id = NodeId(node_id)
        self._session_id = SessionId(f"{draw.getrandbits(128):032x}")
        self._draw = draw
        uuids = [f"GPU-{draw.getrandbits(128):032x}" for _ in range(2)]
        self._cards = tuple(CardTelemetry(uuid, 60, 200_000, 350_000, 18 << 30, 0, 0, throttle_point_celsius=83) for uuid in uuids)
        self._inventory = Inventory(
            operating_system="Linux 6.1 (Debian 12)",
            cpu_count=16,
            memory_bytes=64 << 30,
            disk_free_bytes=500 << 30,
            accelerators=tuple(Accelerator("NVIDIA GeForce RTX 3090", uuid, CARD_BYTES, "8.6", 16, 16, 4, 350_000) for uuid in uuids),
            driver_version="550.54.14",
            cuda_version="12.4",
            memory_budget_bytes=32 << 30,
            engine_kinds=("llamacpp", "vllm"),
        )
        self._engines = (
            EngineStatus(
                replica_id=ReplicaId(f"{node_id}/simulated"),
                model_id=ModelId("simulated"),
                state=EngineState.READY,
                engine_kind="vllm",
                engine_version="0.32.0",
                slot_count=8,
                context_length_tokens=8192,
                endpoints=(Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS),
                kv_capacity_tokens=100_000,
                kv_used_tokens=0,
                waiting_count=0,
                memory_bytes=40 << 30,
                memory_utilization_percent=90,
                prefill_tokens_per_second=2500.0,
                decode_tokens_per_second=60.0,
            ),
        )

    def hello(self, in_flight: tuple[AttemptId, ...]) -> Hello:
        return Hello(
            PROTOCOL_VERSION,
            self._node_id,
            self._session_id,
            "simulated",
            self._inventory,
            NodeState.SERVING,
            in_flight,
            self._engines,
            self._cards,
        )

    def heartbeat(self) -> Heartbeat:
        self.beat_count += 1
        if not self.is_steady:
            self._cards = tuple(
                replace(card, temperature_celsius=self._draw.randint(40, 80), power_milliwatts=self._draw.randint(20_000, 300_000))
                for card in self._cards
            )
        return Heartbeat(0, NodeState.SERVING, self._engines, 500 << 30, self._cards, number=self.beat_count)


class SimulatedLink(Link):
    """The agent's link, with a note of its dials and welcomes."""

    dialled_at: list[float]
    welcomed_at: list[float]
    failures: list[tuple[float, str]]
    fixed_period_seconds: float | None = None

    async def _dial(self, *, patient: bool) -> None:
        self.dialled_at.append(time.monotonic())
        await super()._dial(patient=patient)

    def _settle_in(self, connection: Any, welcome: Welcome, in_flight: tuple[AttemptId, ...], hello_at_seconds: float) -> None:
        super()._settle_in(connection, welcome, in_flight, hello_at_seconds)
        self.welcomed_at.append(time.monotonic())
        self.keep_period()

    def _take(self, frame: node_pb2.CoordinatorFrame) -> None:
        super()._take(frame)
        self.keep_period()

    async def _after_failed_dial(self, error: PotluckError) -> None:
        self.failures.append((time.monotonic(), f"{error.code}: {error.message[:60]}"))
        await super()._after_failed_dial(error)

    def keep_period(self) -> None:
        """A measurement decides how often its nodes beat; otherwise the coordinator does."""
        if self.fixed_period_seconds is not None and self.session.heartbeat_idle_seconds != self.fixed_period_seconds:
            self.session = replace(self.session, heartbeat_idle_seconds=self.fixed_period_seconds)

    @property
    def is_up(self) -> bool:
        return self._current is not None and self.session.phase is Phase.SERVING


class SimulatedAgent:
    """One node: its link, and what the link tells of."""

    def __init__(self, nodes: Nodes, key: EnrolledKey, period_seconds: float | None) -> None:
        clock, replicas, draw = SystemClock(), NoReplicas(), random.Random(key.node_id)
        self.report = BoxReport(key.node_id, draw)
        self.link = SimulatedLink(
            credentials=cast("Any", HeldCredentials(nodes, key)),
            attempts=Attempts(
                replicas=cast("Any", replicas),
                connections=EngineConnections(),
                clock=clock,
                node_state=lambda: NodeState.SERVING,
                slot_count_max=None,
            ),
            replicas=cast("Any", replicas),
            peers=PeerMeasuring(NodeId(key.node_id), None, clock),
            report=self.report,
            clock=clock,
            jitter=random.random,
        )
        self.link.dialled_at, self.link.welcomed_at, self.link.failures = [], [], []
        self.link.fixed_period_seconds = period_seconds
        self.running = asyncio.ensure_future(self.link.run())


class Fleet:
    """The agents of this process; each public method answers one line."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._period_seconds: float | None = None
        self._steady = False
        self.agents: list[SimulatedAgent] = []

    async def link(self, count: int, per_second: float) -> dict[str, Any]:
        """Starts agents, so many a second, until there are `count`."""
        while len(self.agents) < count:
            agent = SimulatedAgent(self._nodes, self._nodes.keys[len(self.agents)], self._period_seconds)
            agent.report.is_steady = self._steady
            self.agents.append(agent)
            await asyncio.sleep(1 / per_second)
        return await self.status()

    async def wait(self, seconds: float) -> dict[str, Any]:
        """Until all of them are linked, but no longer."""
        give_up_at = time.monotonic() + seconds
        while not all(agent.link.is_up for agent in self.agents) and time.monotonic() < give_up_at:
            await asyncio.sleep(0.02)
        return await self.status()

    async def period(self, seconds: float | None, steady: bool = False) -> dict[str, Any]:
        """How often everybody beats from now on, whatever the coordinator says; None: as it says. `steady`: always with the same words."""
        self._period_seconds, self._steady = seconds, steady
        for agent in self.agents:
            agent.link.fixed_period_seconds = seconds
            agent.report.is_steady = steady
            agent.link.keep_period()
        return await self.status()

    async def status(self) -> dict[str, Any]:
        failed = [repr(agent.running.exception()) for agent in self.agents if agent.running.done() and not agent.running.cancelled()]
        return {
            "agents": len(self.agents),
            "linked": sum(agent.link.is_up for agent in self.agents),
            "beats": sum(agent.report.beat_count for agent in self.agents),
            "idle_seconds": sorted({agent.link.session.heartbeat_idle_seconds for agent in self.agents}),
            "failed": failed[:3],
        }

    async def since(self, at: float) -> dict[str, Any]:
        """What has been dialled, and who was welcomed last, since a moment of the monotonic clock."""
        welcomed = [agent.link.welcomed_at[-1] for agent in self.agents if agent.link.welcomed_at and agent.link.welcomed_at[-1] >= at]
        dialled = sorted(moment - at for agent in self.agents for moment in agent.link.dialled_at if moment >= at)
        failures = Counter(words for agent in self.agents for moment, words in agent.link.failures if moment >= at)
        return {"welcomed": sorted(moment - at for moment in welcomed), "dialled": dialled, "failures": dict(failures.most_common(8))}

    async def churn(self, seconds: float, per_second: float) -> dict[str, Any]:
        """Agents end and begin anew, by turns with a goodbye and without a word."""
        give_up_at, turn = time.monotonic() + seconds, 0
        while time.monotonic() < give_up_at:
            number = turn % len(self.agents)
            agent, turn = self.agents[number], turn + 1
            if turn % 2:
                await agent.link.say_goodbye(GoodbyeReason.STOPPING)
            agent.running.cancel()
            await asyncio.gather(agent.running, return_exceptions=True)
            self.agents[number] = SimulatedAgent(self._nodes, self._nodes.keys[number], self._period_seconds)
            await asyncio.sleep(1 / per_second)
        return await self.status()

    async def leave(self) -> dict[str, Any]:
        """Everybody says goodbye, and the process may end."""
        await asyncio.gather(*(agent.link.say_goodbye(GoodbyeReason.STOPPING) for agent in self.agents))
        await asyncio.gather(*(agent.running for agent in self.agents), return_exceptions=True)
        return {"left": len(self.agents)}


async def serve(nodes: Nodes, lines: Callable[[], str], out: Callable[[str], object]) -> None:
    """Answers lines until there are none."""
    loop, fleet, asked = asyncio.get_running_loop(), Fleet(nodes), asyncio.Queue[str]()

    def read() -> None:
        while line := lines():
            loop.call_soon_threadsafe(asked.put_nowait, line)
        loop.call_soon_threadsafe(asked.put_nowait, "")

    threading.Thread(target=read, daemon=True).start()
    while line := await asked.get():
        arguments: dict[str, Any] = json.loads(line)
        answer = await getattr(fleet, arguments.pop("do"))(**arguments)
        out(json.dumps(answer) + "\n")


def main(arguments: Sequence[str]) -> int:
    import uvloop

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))

    def out(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    uvloop.run(serve(Nodes.read(Path(arguments[0])), sys.stdin.readline, out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
