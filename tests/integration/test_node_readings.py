"""What is read off real engines, processes and, from a dump, cards; and what of it the node tells."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from potluck_node.attempts import Attempts
from potluck_node.bounded_body import read_at_most
from potluck_node.domain.solo_rates import ANSWERS_MIN
from potluck_node.engine_exchange import EngineConnections
from potluck_node.engine_session import engine_session
from potluck_node.engines.asking import ask_load
from potluck_node.engines.base import EngineAddress
from potluck_node.probe.nvml import NvmlLibrary
from potluck_node.probe.process_memory import resident_bytes
from potluck_node.readings import Readings
from potluck_node.replicas import Residence
from potluck_node.report import NodeReport
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.clock import SystemClock
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import (
    AttemptId,
    Endpoint,
    EngineState,
    EngineStatus,
    Inventory,
    NodeState,
    ReplicaId,
    SessionId,
    StartAttempt,
)
from tests.support.engines import pinned, running, supervisor_of, wished
from tests.support.node_engine import REPLICA, FixedReplicas, heat_beside
from tests.support.nvml_dump import DumpedDriver, load_dump
from tests.support.tiny_gguf import write_tiny_gguf

MIB = 1 << 20
ANSWER_TOKENS = 64


class Measured:
    """An engine that has metrics and nothing else, told in as many pieces as the test says."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.url = ""

    def count(self, generated_tokens: int) -> None:
        self.pieces = [b"vllm:generation_tokens_total %d\n" % generated_tokens]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in self.pieces:
            await response.write(piece)
            await asyncio.sleep(0.02)  # it leaves by itself
        return response


@pytest.fixture
async def measured() -> AsyncIterator[Measured]:
    engine = Measured()
    application = web.Application()
    application.router.add_get("/metrics", engine.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield engine
    await runner.cleanup()


@asynccontextmanager
async def readings_of(replicas: FixedReplicas, library: NvmlLibrary | None = None) -> AsyncIterator[tuple[Readings, list[ReplicaId]]]:
    heard: list[ReplicaId] = []
    async with engine_session() as http:
        yield Readings(replicas, http, heard=heard.append, library=library), heard


async def test_metrics_that_come_in_pieces_are_read_to_their_end(measured):
    measured.pieces = [b"vllm:num_requests_running 3\n", b"vllm:num_requests_wai", b"ting 2\nvllm:generation_tokens_total 9\n"]
    async with engine_session() as http:
        load = await ask_load(http, "vllm", EngineAddress(measured.url))
        assert (load.running_count, load.waiting_count, load.generated_tokens) == (3, 2, 9)
        async with http.get(measured.url + "/metrics") as response:
            assert await read_at_most(response.content, 40) == b"".join(measured.pieces)[:40]


async def test_an_engine_whose_tokens_grow_in_number_was_heard(measured):
    replicas = FixedReplicas(measured.url)
    replicas.engine_kind = "vllm"
    async with readings_of(replicas) as (readings, heard):
        for generated_tokens, heard_count in ((5, 0), (5, 0), (9, 1), (9, 1), (2, 1), (3, 2)):
            measured.count(generated_tokens)
            await readings.read()
            assert heard == [REPLICA] * heard_count
        measured.pieces = []
        await readings.read()
        measured.count(100)
        await readings.read()
        assert len(heard) == 2, "nothing is known of the time between"


async def test_without_cards_an_engine_takes_what_its_processes_hold():
    code = "import subprocess, sys; held = bytearray(b'x') * (64 << 20); print('held', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", parent, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    replicas = FixedReplicas(None)
    try:
        await child.stdout.readline()
        async with readings_of(replicas) as (readings, _):
            await readings.read()
            assert readings.memory_bytes(REPLICA) is None
            replicas.lives_at = Residence(child.pid)
            await readings.read()
            assert 64 * MIB < readings.memory_bytes(REPLICA) < 192 * MIB
            replicas.lives_at = Residence(child.pid, ("GPU-1",))
            await readings.read()
            assert readings.memory_bytes(REPLICA) is None, "what it holds of the machine is not what it holds of a card"
    finally:
        child.stdin.close()
        await child.wait()
    assert resident_bytes({child.pid}) is None


def test_memory_that_is_hidden_is_unknown(monkeypatch):
    def hidden(_: object) -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil.Process, "memory_full_info", hidden)
    assert resident_bytes({os.getpid()}) is None


async def test_a_fault_of_a_card_is_logged_once_and_stands_in_the_heartbeat_from_then_on():
    driver = DumpedDriver(load_dump("two_memory_nodes"))
    async with readings_of(FixedReplicas(None), NvmlLibrary(lambda: driver)) as (readings, _):
        await readings.read()
        driver.devices[1]["events"] = [{"eventType": 8, "eventData": 31}] * 3 + [{"eventType": 8, "eventData": 79}]
        with capture_logs() as logged:
            await readings.read()
            await readings.read()
    told = [(line["xid"], line["card"], line["count"], line["what"]) for line in logged if line["event"] == "card_fault"]
    assert told == [
        (31, "0000:41:00.0", 3, "a program touched memory that was not its own"),
        (79, "0000:41:00.0", 1, "the card fell off the bus"),
    ]
    assert [(card.newest_xid, card.xid_count) for card in readings.cards] == [(None, 0), (79, 4)]


async def test_what_an_engine_holds_of_its_cards_is_told_and_what_others_hold_is_remembered_where_it_cannot_be_told():
    driver = DumpedDriver(load_dump("healthy_3090"))
    driver.devices[0]["nvmlDeviceGetComputeRunningProcesses_v3"] = [{"pid": os.getpid(), "usedGpuMemory": 5 * MIB}]
    replicas = FixedReplicas(None)
    replicas.lives_at = Residence(os.getpid(), (driver.devices[0]["nvmlDeviceGetUUID"],))
    async with readings_of(replicas, NvmlLibrary(lambda: driver)) as (readings, _):
        await readings.read()
        assert readings.memory_bytes(REPLICA) == 5 * MIB
        assert readings.cards[0].memory_foreign_bytes == 635 * MIB
        # In a container the driver names it by another number.
        driver.devices[0]["nvmlDeviceGetComputeRunningProcesses_v3"][0]["pid"] = 5_000_000
        for _ in range(2):
            await readings.read()
            assert (readings.memory_bytes(REPLICA), readings.cards[0].memory_foreign_bytes) == (None, 635 * MIB)
        replicas.lives_at = None
        driver.devices[0]["nvmlDeviceGetComputeRunningProcesses_v3"] = []
        await readings.read()
        assert readings.cards[0].memory_foreign_bytes == 640 * MIB


class Told:
    """A real engine's attempts, and what the node says of it."""

    def __init__(self, supervisor, http) -> None:
        self.attempts = Attempts(
            replicas=supervisor,
            connections=EngineConnections(),
            clock=SystemClock(),
            node_state=lambda: NodeState.SERVING,
            slot_count_max=None,
        )
        self.readings = Readings(supervisor, http, heard=self.attempts.watches.heard)
        self.report = NodeReport(
            credentials=SimpleNamespace(identity=SimpleNamespace(node_id="n")),
            session_id=SessionId("s"),
            inventory=Inventory(),
            replicas=supervisor,
            attempts=self.attempts,
            readings=self.readings,
            heat=heat_beside(self.readings, supervisor, Path(), SystemClock()),
            peers=SimpleNamespace(measurements=tuple),
            attached=SimpleNamespace(model_names=()),
            line=SimpleNamespace(found=None),
            cache_dir=Path(),
            slot_count_max=None,
            clock=SystemClock(),
        )
        self.sent = node_pb2.NodeFrame()

    def begin(self, name: str, replica_id: ReplicaId) -> None:
        body = {
            "messages": [{"role": "user", "content": f"{name} " * 400}],
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = StartAttempt(AttemptId(name), replica_id, Endpoint.CHAT_COMPLETIONS, json.dumps(body).encode(), True, 1 << 20)
        self.attempts.start(start)

    async def until_ended(self, *names: str) -> None:
        async with asyncio.timeout(60):
            while not {end.attempt_id for end in self.sent.ends}.issuperset(names):
                self.attempts.move_into(self.sent, 1 << 24)
                await asyncio.sleep(0.01)
        assert {end.reason for end in self.sent.ends} == {node_pb2.END_REASON_COMPLETED}

    def status(self) -> EngineStatus:
        return self.report.heartbeat().engines[0]


async def test_a_hello_tells_how_the_cards_were_at_the_last_look():
    async with engine_session() as http:
        told = Told(FixedReplicas(None), http)
        told.readings.cards = (CardTelemetry("gpu", memory_foreign_bytes=5),)
        assert told.report.hello(()).cards == told.report.heartbeat().cards == told.readings.cards


async def test_answers_that_had_a_real_engine_to_themselves_show_its_rates_and_others_do_not(tmp_path):
    tiny_gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    supervisor = supervisor_of(tmp_path, SystemClock())
    async with running(supervisor) as node, engine_session() as http:
        node.wish(wished(pinned(tiny_gguf), kind="llamacpp", slots=2, context=2048))
        replica_id = (await node.until_state(EngineState.READY)).replica_id
        told = Told(supervisor, http)
        for number in range(ANSWERS_MIN):
            names = (f"a{number}", f"b{number}")
            for name in names:
                told.begin(name, replica_id)
            await told.until_ended(*names)
        assert (told.status().decode_tokens_per_second, told.status().prefill_tokens_per_second) == (None, None)
        began, answer_count = asyncio.get_running_loop().time(), 0
        # An answer that a busy machine brings in one piece shows no pace, and does not count.
        while answer_count < ANSWERS_MIN or (told.status().decode_tokens_per_second is None and answer_count < 10 * ANSWERS_MIN):
            told.begin(f"c{answer_count}", replica_id)
            await told.until_ended(f"c{answer_count}")
            answer_count += 1
        seconds = asyncio.get_running_loop().time() - began
        await told.readings.read()
        status = told.status()
        assert status.decode_tokens_per_second > answer_count * (ANSWER_TOKENS - 1) / seconds, "it wrote for less than all of the time"
        assert status.prefill_tokens_per_second > 0
        assert 250 < status.prefill_past_tokens < status.decode_past_tokens < 2048
        assert 20 * MIB < status.memory_bytes < 2048 * MIB
        supervisor.end_hung(replica_id, "the test ends it")
        await node.until_state(EngineState.BACKING_OFF)
        assert (told.status().decode_tokens_per_second, supervisor.residence(replica_id)) == (None, None)
        await told.attempts.close()
