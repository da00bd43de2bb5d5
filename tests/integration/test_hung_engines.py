"""Engines that have work and say nothing: a real one stopped by SIGSTOP, and one whose every byte is decided here."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from potluck_node import supervisor as supervisor_module
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, Endpoint, EngineState, FailureKind, ReplicaId
from tests.support.engines import MovedClock, Watched, children_of, pinned, running, supervisor_of, wished
from tests.support.hearing import TOKEN, hearing
from tests.support.node_engine import DirectedEngine, FixedReplicas, directed_engine
from tests.support.tiny_gguf import write_tiny_gguf

BODY = {"messages": [{"role": "user", "content": "count"}], "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


async def stop_group(pid: int) -> None:
    os.killpg(pid, signal.SIGSTOP)
    await asyncio.sleep(0.2)  # what it has said is read


async def until_failed(node: Watched) -> None:
    status = await node.until_state(EngineState.BACKING_OFF)
    assert (status.failure_kind, status.failure.startswith("the engine hung")) == (FailureKind.HUNG, True)


async def serving(node: Watched, tiny_gguf: Path) -> tuple[ReplicaId, int]:
    node.wish(wished(pinned(tiny_gguf), kind="llamacpp", slots=2, context=2048))
    status = await node.until_state(EngineState.READY)
    (pid,) = children_of(os.getpid())
    return status.replica_id, pid


@pytest.mark.timed
async def test_a_stopped_engine_is_killed_after_half_a_minute_of_silence_and_is_back_after_a_real_token(tmp_path, tiny_gguf):
    clock = MovedClock()
    supervisor = supervisor_of(tmp_path, clock)
    async with running(supervisor) as node, hearing(supervisor, clock) as heard:
        replica_id, pid = await serving(node, tiny_gguf)
        heard.start("a1", replica_id)
        await heard.until(lambda sent: len(sent.chunks) > 5)
        await stop_group(pid)
        await heard.wait(30)
        assert node.supervisor.statuses()[0].state is EngineState.READY
        await heard.wait(1)
        began = time.monotonic()
        end = await heard.until_end("a1")
        assert (end.reason, end.blamed, end.detail) == (node_pb2.END_REASON_ENGINE_FAILED, True, "the engine ended (hung)")
        await until_failed(node)
        assert not Path(f"/proc/{pid}").exists()
        assert time.monotonic() - began < 2.0, "what does not hear is not asked first"
        clock.now_seconds += 1.0
        node.supervisor.set_paused(False)
        await node.until_state(EngineState.READY)
        heard.start("a2", replica_id, max_tokens=3)
        assert (await heard.until_end("a2")).reason == node_pb2.END_REASON_COMPLETED


async def test_where_only_answers_that_come_whole_are_waited_for_a_stopped_engine_is_found_by_asking(tmp_path, tiny_gguf, monkeypatch):
    monkeypatch.setattr(supervisor_module, "_ANY_WORD", aiohttp.ClientTimeout(total=0.3))
    clock = MovedClock()
    supervisor = supervisor_of(tmp_path, clock)
    async with running(supervisor) as node, hearing(supervisor, clock) as heard:
        replica_id, pid = await serving(node, tiny_gguf)
        await stop_group(pid)
        heard.start("a1", replica_id, stream=False)  # the kernel takes the connection; asked later, a quick engine has answered already
        await heard.wait(33)
        end = await heard.until_end("a1")
        assert (end.reason, end.blamed) == (node_pb2.END_REASON_ENGINE_FAILED, True)
        await until_failed(node)


async def test_an_engine_at_work_on_a_long_answer_that_comes_whole_is_asked_and_left_in_peace(tmp_path, tiny_gguf):
    clock = MovedClock()
    supervisor = supervisor_of(tmp_path, clock)
    async with running(supervisor) as node, hearing(supervisor, clock) as heard:
        replica_id, pid = await serving(node, tiny_gguf)
        await stop_group(pid)  # else the answer may be whole before the question
        heard.start("a1", replica_id, stream=False, max_tokens=700)
        await heard.wait(33)
        assert list(heard.watchdog._questions) == [replica_id]
        os.killpg(pid, signal.SIGCONT)
        assert (await heard.until_end("a1")).reason == node_pb2.END_REASON_COMPLETED
        assert children_of(os.getpid()) == [pid]


@pytest.fixture
async def engine() -> AsyncIterator[DirectedEngine]:
    async with directed_engine() as made:
        yield made


async def test_tokens_keep_an_engine_alive_and_a_role_does_not(engine):
    clock = MovedClock()
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        heard.start("a1")
        conversation = await engine.next_conversation()
        for count in range(4):
            conversation.say(TOKEN)
            await heard.until(lambda sent, count=count: len(sent.chunks) > count)
            await heard.wait(25)
        assert replicas.ended == []
        await heard.wait(10)
        assert len(replicas.ended) == 1
        assert (await heard.until_end("a1")).blamed

        # The next engine names the role at once for everyone who asks, and never begins.
        heard.start("b1")
        (await engine.next_conversation()).say(TOKEN)
        await heard.until(lambda sent: sent.chunks[-1].attempt_id == "b1")
        await heard.wait(20)
        heard.start("b2")
        (await engine.next_conversation()).say(TOKEN)
        await heard.until(lambda sent: sent.chunks[-1].attempt_id == "b2")
        await heard.wait(15)
        assert len(replicas.ended) == 2


@pytest.mark.parametrize("keep_alive", [b":\n\n", b": ping - 2026-11-22\r\n\r\n"])
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS])
async def test_an_engine_that_only_keeps_its_stream_alive_is_as_silent_as_one_that_says_nothing(engine, keep_alive, endpoint):
    """llama.cpp writes the first every 30 s, from a thread that goes on while its model hangs; others the second, every 15 s."""
    clock = MovedClock()
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        heard.start("a1", endpoint=endpoint)
        conversation = await engine.next_conversation()
        for _ in range(2):
            conversation.say(TOKEN)
        await heard.until(lambda sent: b"".join(chunk.data for chunk in sent.chunks).count(TOKEN) == 2)
        await heard.wait(25)
        conversation.say(keep_alive[:1])
        conversation.say(keep_alive[1:])
        await asyncio.sleep(0.05)
        await heard.wait(4)
        assert replicas.ended == []
        await heard.wait(3)
        assert len(replicas.ended) == 1


async def test_an_engine_that_keeps_its_stream_alive_while_it_reads_a_long_prompt_has_its_time_and_no_more(engine):
    clock = MovedClock()
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        heard.start("a1", padding="x" * 10_000)
        conversation = await engine.next_conversation()
        conversation.say(TOKEN)  # stands for the role
        for _ in range(5):
            conversation.say(b":\n\n")
            await asyncio.sleep(0.02)
            await heard.wait(25)
        assert replicas.ended == []
        conversation.say(b":\n\n")
        await asyncio.sleep(0.02)
        await heard.wait(10)
        assert len(replicas.ended) == 1


async def test_a_long_prompt_has_its_time(engine):
    clock = MovedClock()
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        heard.start("a1", padding="x" * 10_000)
        await engine.next_conversation()
        await heard.wait(125)
        assert replicas.ended == [], "half a minute, and a hundred seconds for ten thousand bytes"
        await heard.wait(10)
        assert len(replicas.ended) == 1


async def test_a_client_that_reads_slowly_is_not_the_engines_silence(engine):
    clock = MovedClock()
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        heard.start("a1", window_bytes=4 * len(TOKEN))
        conversation = await engine.next_conversation()
        for _ in range(20):
            conversation.say(TOKEN)
        await heard.until(lambda sent: len(sent.chunks) >= 2)
        await asyncio.sleep(0.1)
        await heard.wait(600)
        assert replicas.ended == []
        heard.attempts.acknowledge(AttemptId("a1"), len(heard.sent.chunks))
        await heard.until(lambda sent: len(sent.chunks) >= 3)
        assert replicas.ended == []


async def test_time_in_which_the_agent_itself_stood_still_is_nobodys_silence(engine):
    clock = MovedClock()
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        heard.start("a1")
        (await engine.next_conversation()).say(TOKEN)
        await heard.until(lambda sent: sent.chunks)
        clock.now_seconds += 3_600.0
        heard.watchdog.look()
        await heard.wait(29)
        assert replicas.ended == []
        await heard.wait(5)
        assert len(replicas.ended) == 1


async def test_clients_that_give_up_one_after_another_do_not_hide_a_silence(engine):
    clock = MovedClock()
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        for number in range(3):
            heard.start(f"a{number}")
            await engine.next_conversation()
            await heard.wait(11)
            heard.attempts.cancel(AttemptId(f"a{number}"))
            await heard.wait(1_000)
            assert replicas.ended == [], "nobody waits"
        heard.start("a9")
        await engine.next_conversation()
        await heard.wait(5)
        assert len(replicas.ended) == 1


async def test_a_client_that_hangs_up_on_a_silent_engine_leaves_its_request_a_suspect(engine):
    clock = MovedClock()
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        for number in range(2):
            heard.start(f"k{number}", padding="killer")
            await engine.next_conversation()
            await heard.wait(10)
            heard.attempts.cancel(AttemptId(f"k{number}"))
            heard.start(f"i{number}", padding=f"innocent {number}")
            await engine.next_conversation()
            await heard.wait(25)
            assert len(replicas.ended) == number + 1
        heard.start("k9", padding="killer")
        assert (await heard.until_end("k9")).reason == node_pb2.END_REASON_REFUSED
        heard.start("i9", padding="innocent 1")
        await engine.next_conversation()

        # Once the engine has spoken, whoever left before did it no harm.
        clock.now_seconds += 0.1
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, clock) as heard:
        for number in range(2):
            heard.start(f"a{number}", padding="left in peace")
            await engine.next_conversation()
            heard.attempts.cancel(AttemptId(f"a{number}"))
            heard.start(f"b{number}", padding=f"answered {number}")
            conversation = await engine.next_conversation()
            conversation.say(TOKEN)
            conversation.finish()
            await heard.until_end(f"b{number}")
            heard.start(f"c{number}", padding=f"another {number}")
            await engine.next_conversation()
            replicas.die(FailureKind.CRASHED)
        heard.start("a9", padding="left in peace")
        await engine.next_conversation()
