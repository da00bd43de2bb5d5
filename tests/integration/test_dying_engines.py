"""Engines that die under an answer: what its end says, whom it blames, and what a request that kills them twice is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from potluck_node import attempts as attempts_module
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, EngineState, FailureKind
from tests.support.engines import MovedClock, pinned, running, script_file, supervisor_of, wished
from tests.support.hearing import TOKEN, hearing
from tests.support.node_engine import REPLICA, DirectedEngine, FixedReplicas, directed_engine


@pytest.fixture
async def engine() -> AsyncIterator[DirectedEngine]:
    async with directed_engine() as made:
        yield made


async def test_an_answer_that_breaks_off_waits_a_moment_for_word_of_its_engines_death(engine, monkeypatch):
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, MovedClock()) as heard:
        for name, kind, blamed in (("a1", FailureKind.CRASHED, True), ("a2", FailureKind.KILLED, False)):
            heard.start(name)
            (await engine.next_conversation()).break_off()
            await asyncio.sleep(0.1)
            assert heard.attempts.running_count(REPLICA) == 1
            replicas.die(kind)
            end = await heard.until_end(name)
            assert (end.reason, end.blamed, end.detail) == (node_pb2.END_REASON_ENGINE_FAILED, blamed, f"the engine ended ({kind})")
        monkeypatch.setattr(attempts_module, "DEATH_KNOWN_SECONDS", 0.05)
        heard.start("a3")
        (await engine.next_conversation()).break_off()
        end = await heard.until_end("a3")
        assert (end.blamed, end.detail) == (False, "the engine's connection failed: AnswerBrokenError")


async def test_an_answer_held_up_by_its_client_tells_of_its_engines_death_after_what_that_had_said(engine, monkeypatch):
    monkeypatch.setattr(attempts_module, "DEATH_KNOWN_SECONDS", 600.0)
    replicas = FixedReplicas(engine.url)
    async with hearing(replicas, MovedClock()) as heard:
        heard.start("a1", window_bytes=4 * len(TOKEN))
        conversation = await engine.next_conversation()
        for _ in range(20):
            conversation.say(TOKEN)
        conversation.break_off()
        await heard.until(lambda sent: len(sent.chunks) >= 2)
        await asyncio.sleep(0.1)
        replicas.die(FailureKind.CRASHED)
        assert heard.sent.ends == []
        # The client reads on.
        await heard.until(lambda sent: heard.attempts.acknowledge(AttemptId("a1"), len(sent.chunks)) or sent.ends)
        (end,) = heard.sent.ends
        assert b"".join(chunk.data for chunk in heard.sent.chunks) == 20 * TOKEN
        assert (end.reason, end.blamed, end.detail) == (node_pb2.END_REASON_ENGINE_FAILED, False, "the engine ended (crashed)")


async def test_what_an_engine_says_while_it_dies_counts_as_its_death(engine):
    """vLLM 0.32 says so for two seconds before it ends."""
    replicas = FixedReplicas(engine.url)
    dying = b'data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", "code": 500}}\n\n'
    async with hearing(replicas, MovedClock()) as heard:
        for name in ("a1", "a2"):
            heard.start(name)
            conversation = await engine.next_conversation()
            conversation.say(TOKEN)
            conversation.say(dying + b"data: [DONE]\n\n")
            conversation.finish()
            await heard.until(lambda sent: sent.chunks and dying in sent.chunks[-1].data)
            replicas.die(FailureKind.CRASHED)
            assert (await heard.until_end(name)).blamed
        heard.start("a3")
        end = await heard.until_end("a3")
        assert (end.reason, end.blamed) == (node_pb2.END_REASON_REFUSED, True), "two engines died of it"


async def test_an_engine_that_takes_no_connections_was_sent_nothing():
    async with hearing(FixedReplicas("http://127.0.0.1:9"), MovedClock()) as heard:
        heard.start("a1")
        end = await heard.until_end("a1")
        assert (end.reason, end.detail) == (node_pb2.END_REASON_REFUSED, "the engine takes no connections")


async def test_a_request_that_kills_two_engines_is_refused_and_the_same_one_answered_in_between_is_not(tmp_path):
    clock = MovedClock()
    supervisor = supervisor_of(tmp_path, clock)
    async with running(supervisor) as node, hearing(supervisor, clock) as heard:
        node.wish(wished(pinned(script_file(tmp_path)), slots=4))
        replica_id = (await node.until_state(EngineState.READY)).replica_id
        killer = {"scripted": {"exit_after_tokens": 1}}
        for name in ("k1", "k2"):
            heard.start(f"{name}-innocent", replica_id, scripted={"hang_after_tokens": 1})
            await heard.until(lambda sent, name=name: any(chunk.attempt_id == f"{name}-innocent" for chunk in sent.chunks))
            heard.start(name, replica_id, **killer)
            assert (await heard.until_end(name)).blamed
            assert (await heard.until_end(f"{name}-innocent")).blamed
            await node.until_state(EngineState.BACKING_OFF)
            clock.now_seconds += 2.0
            node.supervisor.set_paused(False)
            await node.until_state(EngineState.READY)
        # Both were at both deaths: which of them it was, nobody can tell yet.
        heard.start("k3", replica_id, **killer)
        assert (await heard.until_end("k3")).reason == node_pb2.END_REASON_ENGINE_FAILED
        await node.until_state(EngineState.BACKING_OFF)
        clock.now_seconds += 4.0
        node.supervisor.set_paused(False)
        await node.until_state(EngineState.READY)
        heard.start("k4", replica_id, **killer)
        assert (await heard.until_end("k4")).reason == node_pb2.END_REASON_REFUSED
        heard.start("innocent", replica_id)
        assert (await heard.until_end("innocent")).reason == node_pb2.END_REASON_COMPLETED
