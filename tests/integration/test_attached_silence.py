"""A server that its owner runs may be at his work, or load its model first: its silence is judged otherwise, and no request is blamed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from potluck_coordinator.gateway.dispatching import REQUEST_SECONDS_MAX
from potluck_node import attached_servers
from potluck_node.attached_servers import AttachedServers
from potluck_node.child_process import ChildProcess
from potluck_node.control import AttachedLine
from potluck_node.domain.attached import Answer, AttachedServer, model_names
from potluck_node.domain.failures import diagnose
from potluck_node.domain.plan import ObservedReplica, Phase
from potluck_node.engines import attach_server
from potluck_node.engines.attach import AttachEngine
from potluck_node.engines.attach_server import Front, GoneError
from potluck_node.engines.base import EngineLaunch
from potluck_node.engines.process import EngineFailedError, EngineProcess
from potluck_node.engines.registry import available_engines
from potluck_node.replica_record import ReplicaRecord
from potluck_node.settings import Settings
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import DesiredEngine, EngineState, FailureKind, ModelFile, ModelId, ReplicaId
from tests.integration.test_hung_engines import TOKEN, hearing
from tests.support.engines import MovedClock, running, supervisor_of
from tests.support.kernel_counts import count_kills
from tests.support.node_engine import FixedReplicas, directed_engine

WISH = DesiredEngine(ReplicaId("replica-1"), ModelFile(ModelId("tiny"), "attach:theirs", "", "", 0), "attach", 2, 1024)
ANSWER = {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}


class OneAtATime:
    """Answers one request at a time, and whoever holds `slot` keeps it busy; lists its model meanwhile, unless told otherwise."""

    def __init__(self) -> None:
        self.slot = asyncio.Lock()
        self.lists = True
        self.status = 200
        self.answer_status = 200
        self.ids: list[object] = ["theirs"]
        self.came = asyncio.Event()
        self.url = ""

    async def models(self, _: web.Request) -> web.Response:
        if not self.lists:
            await asyncio.Event().wait()
        return web.json_response({"data": [{"id": name} for name in self.ids]}, status=self.status)

    async def answer(self, _: web.Request) -> web.Response:
        self.came.set()
        async with self.slot:
            if self.answer_status != 200:
                return web.json_response({"error": {"message": "Loading model"}}, status=self.answer_status)
            return web.json_response(ANSWER)


@asynccontextmanager
async def one_at_a_time() -> AsyncIterator[OneAtATime]:
    server = OneAtATime()
    application = web.Application()
    application.router.add_get("/v1/models", server.models)
    for path in ("/v1/completions", "/v1/chat/completions"):
        application.router.add_post(path, server.answer)
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


async def test_a_server_of_one_slot_has_all_the_time_of_a_request_again_and_again_whoever_keeps_it_busy(tmp_path):
    clock = MovedClock()
    async with one_at_a_time() as server:
        servers = AttachedServers([AttachedServer(server.url)])
        supervisor = supervisor_of(tmp_path, clock, engines=available_engines(Settings(), servers))
        async with running(supervisor) as node, hearing(supervisor, clock) as heard:
            node.wish(WISH)
            replica_id = (await node.until_state(EngineState.READY)).replica_id
            for name, stream in (("a1", False), ("a2", False), ("a3", True), ("a4", True)):
                server.came.clear()
                async with server.slot:
                    heard.start(name, replica_id, stream=stream)
                    await asyncio.wait_for(server.came.wait(), 5)
                    await heard.wait(REQUEST_SECONDS_MAX - 10)
                    await asyncio.sleep(0.1)
                    assert heard.watchdog._questions == {}, "a question would only stand in the same line"
                assert (await heard.until_end(name)).reason == node_pb2.END_REASON_COMPLETED
                assert supervisor.statuses()[0].state is EngineState.READY


@pytest.mark.parametrize("kind", [FailureKind.HUNG, FailureKind.CRASHED, FailureKind.OUT_OF_MEMORY])
async def test_whatever_becomes_of_it_a_request_that_waited_may_come_again(kind):
    async with directed_engine() as engine, hearing(replicas := FixedReplicas(engine.url), MovedClock()) as heard:
        replicas.engine_kind = "attach"
        for number in range(3):
            heard.start(f"a{number}")
            await engine.next_conversation()
            replicas.die(kind)
            end = await heard.until_end(f"a{number}")
            assert (end.reason, end.blamed) == (node_pb2.END_REASON_ENGINE_FAILED, False)
        heard.start("a9")
        conversation = await engine.next_conversation()
        conversation.say(TOKEN)
        conversation.finish()
        assert (await heard.until_end("a9")).reason == node_pb2.END_REASON_COMPLETED


async def test_one_that_goes_and_comes_again_and_again_opens_no_breaker(tmp_path):
    supervisor = supervisor_of(tmp_path, MovedClock())
    replica = ReplicaRecord(ObservedReplica(WISH, Phase.READY))
    for kind in (FailureKind.KILLED, FailureKind.HUNG) * 4:
        supervisor._fail(replica, EngineFailedError("the attached server went away", kind))
    assert (replica.observed.crashes.is_open, replica.failure) == (False, "the attached server went away")
    for _ in range(5):
        supervisor._fail(replica, EngineFailedError("its first answer had no token"))
    assert replica.observed.crashes.is_open


@pytest.mark.parametrize(
    ("kind", "status", "failure_kind"),
    [
        *(("attach", status, FailureKind.HUNG) for status in (429, 502, 503, 504)),
        ("attach", 500, FailureKind.NOT_STARTED),
        ("attach", 401, FailureKind.NOT_STARTED),
        ("vllm", 503, FailureKind.NOT_STARTED),
    ],
)
async def test_one_that_loads_its_model_is_busy_and_an_engine_of_ours_that_says_so_has_failed(
    tmp_path, monkeypatch, kind, status, failure_kind
):
    counts = tmp_path / "vmstat"
    counts.write_text("oom_kill 1\n")
    count_kills(monkeypatch, counts)
    launch = EngineLaunch(ModelId("tiny"), tmp_path, slot_count=1, context_length_tokens=64, attached_name="theirs")
    async with one_at_a_time() as server, aiohttp.ClientSession() as session:
        server.answer_status = status
        code = f"print({json.dumps({'url': server.url})!r}, flush=True); import time; time.sleep(60)"
        probe = AttachEngine(AttachedServers(())).probe(launch)
        engine = SimpleNamespace(kind=kind, variables={}, arguments=lambda _: ("-c", code), probe=lambda _: probe)
        with pytest.raises(EngineFailedError, match=f"HTTP status {status}") as failed:
            await EngineProcess.start(engine, launch, os.environ, session)
    assert failed.value.kind is failure_kind


async def test_what_the_kernel_kills_beside_it_is_no_shortage_of_what_stands_for_it_here(tmp_path, monkeypatch):
    """It could not be given less, and would be given up for good."""
    counts = tmp_path / "vmstat"
    counts.write_text("oom_kill 1\n")
    count_kills(monkeypatch, counts)
    for kind, failure_kind in (("attach", FailureKind.CRASHED), ("vllm", FailureKind.OUT_OF_MEMORY)):
        engine = EngineProcess(ChildProcess.spawn(("-c", "raise SystemExit(1)"), os.environ), kind)
        counts.write_text("oom_kill 2\n")
        assert (await engine.wait()).kind is failure_kind
        counts.write_text("oom_kill 1\n")
        await engine.stop()


@asynccontextmanager
async def asked(server: OneAtATime, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Front]:
    """What stands for it here, with a request on its way, and little patience."""
    for name, seconds in (("LOOK_SECONDS", 0.02), ("WAIT_LOOK_SECONDS", 0.02), ("WORD_SECONDS_MAX", 0.4)):
        monkeypatch.setattr(attach_server, name, seconds)
    monkeypatch.setattr(attached_servers, "ANSWER_LIMIT_SECONDS", 0.05)
    async with aiohttp.ClientSession(auto_decompress=False) as http:
        front = Front(http, AttachedServer(server.url), "theirs")
        async with front.serve() as url:
            asking = asyncio.create_task(http.post(f"{url}/v1/completions", data=b"{}"))
            await asyncio.wait_for(server.came.wait(), 5)
            yield front
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


async def test_one_that_lists_its_models_is_at_work(monkeypatch):
    async with one_at_a_time() as server, server.slot, asked(server, monkeypatch) as front:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(front.until_gone(), 1.0)


async def test_one_that_neither_answers_nor_lists_them_for_as_long_as_a_request_may_take_is_given_up_as_hung(monkeypatch):
    async with one_at_a_time() as server, server.slot, asked(server, monkeypatch) as front:
        server.lists = False
        with pytest.raises(GoneError, match=r"says nothing any more: no answer and no list of models for \d+ s$") as gone:
            await asyncio.wait_for(front.until_gone(), 10)
    assert diagnose("exit status 69", [str(gone.value)], served=True).kind is FailureKind.HUNG


async def test_one_that_nobody_waits_for_here_may_be_at_its_owners_work_for_ever(monkeypatch):
    async with one_at_a_time() as server, asked(server, monkeypatch) as front:
        while front._under_way_count:
            await asyncio.sleep(0.01)
        server.lists = False
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(front.until_gone(), 1.0)


async def test_the_owner_sees_what_each_server_is_and_what_it_lacks_and_one_that_is_busy_keeps_its_models(monkeypatch, tmp_path):
    monkeypatch.setattr(attached_servers, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(attached_servers, "ANSWER_LIMIT_SECONDS", 0.2)
    async with one_at_a_time() as sound, one_at_a_time() as broken:
        broken.status = 500
        listed = [AttachedServer(sound.url), AttachedServer(broken.url), AttachedServer("http://127.0.0.1:9")]
        servers = AttachedServers([*listed, AttachedServer("http://127.0.0.1:10", str(tmp_path / "none"))])
        assert {line.trouble for line in servers.lines} == {"not looked for yet"}
        async with servers.watched(lambda: None):
            kind, place = "an OpenAI-compatible server", listed[0].place
            assert servers.lines == (
                AttachedLine(place, kind, ("theirs",), ""),
                AttachedLine(listed[1].place, "", (), "HTTP status 500 for /v1/models"),
                AttachedLine("127.0.0.1:9", "", (), "no answer"),
                AttachedLine("127.0.0.1:10", "", (), f"its key cannot be read from {tmp_path / 'none'}"),
            )
            sound.lists = False
            async with asyncio.timeout(5):
                while not servers.lines[0].trouble:
                    await asyncio.sleep(0.02)
            assert servers.lines[0] == AttachedLine(place, kind, ("theirs",), "it listens, and does not answer just now")
            assert servers.model_names == ("theirs",)
            sound.lists, sound.status = True, 503
            async with asyncio.timeout(5):
                while servers.lines[0].trouble != "HTTP status 503 for /v1/models":
                    await asyncio.sleep(0.02)
            assert servers.model_names == ("theirs",), "it listens, and lists nothing just now"
            sound.status = 404
            async with asyncio.timeout(5):
                while servers.model_names:
                    await asyncio.sleep(0.02)
            assert servers.lines[0].trouble == "HTTP status 404 for /v1/models"


async def test_whatever_one_server_lists_the_others_are_looked_at_on_and_on(monkeypatch):
    monkeypatch.setattr(attached_servers, "LOOK_SECONDS", 0.02)
    async with one_at_a_time() as sound, one_at_a_time() as odd, aiohttp.ClientSession() as http:
        odd.ids = [["x"], "odd"]
        assert await attach_server.server_with(http, [AttachedServer(odd.url)], "odd") == AttachedServer(odd.url)
        servers = AttachedServers([AttachedServer(odd.url), AttachedServer(sound.url)])
        async with servers.watched(lambda: None):
            assert servers.model_names == ("odd", "theirs")

            def cannot_read(answer: Answer) -> tuple[str, ...]:
                if "odd" in str(answer.value):
                    raise TypeError
                return model_names(answer)

            monkeypatch.setattr(attached_servers, "model_names", cannot_read)
            async with asyncio.timeout(5):
                while servers.lines[0].trouble != "what it answers cannot be read: TypeError":
                    await asyncio.sleep(0.02)
            sound.ids = ["another"]
            async with asyncio.timeout(5):
                while servers.model_names != ("another",):
                    await asyncio.sleep(0.02)
