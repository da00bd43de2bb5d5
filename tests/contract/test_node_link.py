"""The agent's link against a coordinator on real gRPC with mutual TLS, and an engine on real HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from potluck_node.domain import session as lease
from potluck_node.domain.session import Phase
from potluck_protocol.codec import goodbye_message
from potluck_protocol.engine_codec import desired_state_message
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import DesiredEngine, DesiredState, EngineState, GoodbyeReason, ModelFile, ModelId, NodeState, ReplicaId
from tests.support.fault_proxy import fault_proxy
from tests.support.link_coordinator import LinkCoordinator, link_coordinator
from tests.support.node_engine import DirectedEngine, directed_engine, wired_node


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[LinkCoordinator]:
    async with link_coordinator(tmp_path) as running:
        yield running


@pytest.fixture
async def engine() -> AsyncIterator[DirectedEngine]:
    async with directed_engine() as running:
        yield running


def event(number: int) -> bytes:
    return b'data: {"n":%d}\n\n' % number


def desired(revision: int) -> DesiredState:
    file = ModelFile(ModelId("tiny"), "path:/models", "tiny.gguf", "0" * 64, 1)
    return DesiredState(revision, (DesiredEngine(ReplicaId("r1"), file, "scripted", 4, 2048),))


async def test_the_first_frame_is_a_hello_alone_and_a_welcome_brings_the_wish(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        assert link.hello.node_id == node.folder.identity().node_id
        assert link.hello.session_id == "session-1"
        assert [engine.replica_id for engine in link.hello.engines] == ["r1"]
        await link.welcome(epoch=7, desired=desired(3))
        frame = await link.until(lambda: next((f for f in link.frames if f.HasField("heartbeat")), None))
        assert frame.epoch == 7
        assert frame.heartbeat.state == node_pb2.NODE_STATE_SERVING
        assert node.link.session.phase is Phase.SERVING
        await link.send(desired=desired_state_message(desired(2)))
        await link.send(desired=desired_state_message(desired(4)))
        beats = len(link.frames)
        await link.until(lambda: len(link.frames) > beats)
        assert [wish.revision for wish in node.replicas.desired] == [3, 4]


async def test_a_node_that_was_told_when_to_come_again_is_quick_again_once_it_was_let_in(coordinator, tmp_path, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(lease, "reconnect_delay_seconds", lambda _count, _jitter, told_seconds: told.append(told_seconds) or 0.0)
    coordinator.come_again_seconds = 5.0
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome()
        await link.until(lambda: node.link.session.phase is Phase.SERVING and link.frames)
        link.close()
        await coordinator.next_link()
    assert told == [0.0, 5.0, 0.0]


async def test_a_change_of_status_is_told_before_the_next_heartbeat_is_due(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome(heartbeat_busy_ms=60_000, heartbeat_idle_ms=60_000)
        await link.until(lambda: node.link.session.phase is Phase.SERVING or None) if link.frames else await asyncio.sleep(0.3)
        node.replicas.change(EngineState.BACKING_OFF)
        frame = await link.until(lambda: next((f for f in link.frames if f.HasField("heartbeat")), None), 2)
        assert frame.heartbeat.engines[0].state == node_pb2.ENGINE_STATE_BACKING_OFF


async def test_a_streamed_answer_arrives_whole_in_order_and_cut_at_events(coordinator, engine, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, engine.url):
        link = await coordinator.next_link()
        await link.welcome()
        await link.start("a1", body=b'{"stream":true}')
        talk = await engine.next_conversation()
        assert talk.body == b'{"stream":true}'
        talk.say(event(1))
        await link.until(lambda: link.data("a1") == event(1))
        text = b"".join(event(number) for number in range(2, 40))
        talk.say(text[:17])
        talk.say(text[17:101])
        # Some servers end lines so.
        talk.say(text[101:].replace(b"\n", b"\r\n") + b"data: [DONE]\r\n\r")
        talk.say(b"\n")
        talk.finish()
        end = await link.until_end("a1")
        assert end.reason == node_pb2.END_REASON_COMPLETED
        chunks = link.chunks("a1")
        assert [chunk.sequence for chunk in chunks] == list(range(end.sequence))
        assert chunks[0].head.http_status == 200
        assert chunks[0].head.content_type.startswith("text/event-stream")
        assert not any(chunk.HasField("head") for chunk in chunks[1:])
        assert all(chunk.data.endswith(b"\n\n") for chunk in chunks)
        assert link.data("a1") == event(1) + text + b"data: [DONE]\n\n"


async def test_an_error_of_the_engine_passes_through_unparsed(coordinator, engine, tmp_path) -> None:
    engine.status, engine.content_type = 400, "application/json"
    async with wired_node(coordinator, tmp_path, engine.url):
        link = await coordinator.next_link()
        await link.welcome()
        await link.start("a1")
        talk = await engine.next_conversation()
        talk.say(b'{"error":{"message":"no"}}')
        talk.finish()
        end = await link.until_end("a1")
        assert end.reason == node_pb2.END_REASON_COMPLETED
        assert link.chunks("a1")[0].head.http_status == 400
        assert link.data("a1") == b'{"error":{"message":"no"}}'


async def test_a_full_window_stops_reading_the_engine_until_it_is_acknowledged(coordinator, engine, tmp_path) -> None:
    engine.content_type = "application/json"
    total_bytes = 16 * 1024 * 1024
    async with wired_node(coordinator, tmp_path, engine.url):
        link = await coordinator.next_link()
        await link.welcome()
        await link.start("a1", stream=False, window_bytes=65_536)
        talk = await engine.next_conversation()
        for _ in range(total_bytes // 65_536):
            talk.say(b"x" * 65_536)
        talk.finish()
        await link.until(lambda: len(link.data("a1")) > 40_000)
        beats = len(link.frames)
        await link.until(lambda: len(link.frames) > beats + 2)
        written_bytes = talk.written_bytes
        await link.until(lambda: len(link.frames) > beats + 4)
        assert len(link.data("a1")) <= 65_536
        # How much of it the kernel has taken differs: its buffers grow to 9 MB on a busy machine.
        assert talk.written_bytes == written_bytes < total_bytes - 1024 * 1024, "the engine must feel the pause"
        while link.end("a1") is None:
            known = len(link.chunks("a1"))
            await link.acknowledge("a1", known)
            await link.until(lambda known=known: len(link.chunks("a1")) > known or link.end("a1"))
            unacknowledged = sum(len(chunk.data) for chunk in link.chunks("a1")[known:])
            assert unacknowledged <= 65_536
        assert len(link.data("a1")) == total_bytes


async def test_a_cut_link_resumes_without_a_lost_or_repeated_byte(coordinator, engine, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, engine.url) as node:
        link = await coordinator.next_link()
        await link.welcome(epoch=3)
        await link.start("a1")
        talk = await engine.next_conversation()
        for number in range(10):
            talk.say(event(number))
            await link.until(lambda number=number: event(number) in link.data("a1"))
        link.close()
        again = await coordinator.next_link()
        assert again.hello.session_id == link.hello.session_id
        assert [attempt.attempt_id for attempt in again.hello.in_flight] == ["a1"]
        talk.say(event(10))
        # The coordinator lost the last four chunks with the link.
        arrived = link.chunks("a1")[:-4]
        await again.welcome(epoch=3, resume={"a1": len(arrived)})
        talk.say(event(11))
        talk.finish()
        end = await again.until_end("a1")
        chunks = arrived + again.chunks("a1")
        assert [chunk.sequence for chunk in chunks] == list(range(end.sequence))
        assert b"".join(chunk.data for chunk in chunks) == b"".join(event(number) for number in range(12))
        assert node.link.session.epoch == 3


async def test_an_attempt_that_the_welcome_does_not_name_is_dropped(coordinator, engine, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, engine.url) as node:
        link = await coordinator.next_link()
        await link.welcome(epoch=1)
        await link.start("a1")
        talk = await engine.next_conversation()
        talk.say(event(1))
        await link.until(lambda: link.data("a1"))
        link.close()
        again = await coordinator.next_link()
        await again.welcome(epoch=2)
        talk.say(event(2) * 1000)
        async with asyncio.timeout(10):
            await talk.gone.wait()
        assert node.attempts.in_flight == ()
        assert again.chunks("a1") == []


async def test_a_lease_that_is_not_renewed_fences_the_node(coordinator, engine, tmp_path) -> None:
    coordinator.renew_leases = False
    async with wired_node(coordinator, tmp_path, engine.url) as node:
        link = await coordinator.next_link()
        await link.welcome(epoch=1, lease_ttl_ms=400, heartbeat_busy_ms=50, heartbeat_idle_ms=50)
        await link.start("a1")
        talk = await engine.next_conversation()
        talk.say(event(1))
        await link.until(lambda: link.data("a1"))
        again = await coordinator.next_link(2)
        assert node.attempts.in_flight == ()
        assert list(again.hello.in_flight) == []
        talk.say(event(2))
        async with asyncio.timeout(10):
            await talk.gone.wait()
        await asyncio.wait_for(link.ended.wait(), 10)
        assert link.end("a1") is None


async def test_renewed_leases_keep_the_node_serving(coordinator, tmp_path) -> None:
    coordinator.lease_ttl_ms = 400
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome(lease_ttl_ms=400, heartbeat_busy_ms=50, heartbeat_idle_ms=50)
        await link.until(lambda: sum(frame.HasField("heartbeat") for frame in link.frames) > 20)
        assert node.link.session.phase is Phase.SERVING
        assert coordinator.links.empty()


@pytest.mark.timed
async def test_cancelling_closes_the_engines_connection_within_a_second(coordinator, engine, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, engine.url, slot_count=1) as node:
        link = await coordinator.next_link()
        await link.welcome()
        await link.start("a1")
        talk = await engine.next_conversation()
        talk.say(event(1))
        await link.until(lambda: link.data("a1"))
        started = time.monotonic()
        await link.send(cancels=[node_pb2.CancelAttempt(attempt_id="a1")])
        end = await link.until_end("a1")
        async with asyncio.timeout(1):
            while not talk.gone.is_set():
                talk.say(event(2))
                await asyncio.sleep(0.01)
        assert time.monotonic() - started < 1
        assert (end.reason, end.sequence) == (node_pb2.END_REASON_CANCELLED, 1)
        assert node.attempts.running_count(ReplicaId("r1")) == 0


async def test_cancelling_before_the_first_byte_frees_the_slot(coordinator, engine, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, engine.url, slot_count=1):
        link = await coordinator.next_link()
        await link.welcome()
        await link.start("a1")
        talk = await engine.next_conversation()
        # One frame frees the slot and gives it away again.
        await link.send(
            cancels=[node_pb2.CancelAttempt(attempt_id="a1")],
            starts=[node_pb2.StartAttempt(attempt_id="a2", replica_id="r1", endpoint=1, body=b"{}", stream=True, window_bytes=1000)],
        )
        end = await link.until_end("a1")
        assert (end.reason, end.sequence) == (node_pb2.END_REASON_CANCELLED, 0)
        other = await engine.next_conversation()
        async with asyncio.timeout(10):
            while not talk.gone.is_set():
                talk.say(event(2))
                await asyncio.sleep(0.01)
        other.say(event(1))
        other.finish()
        assert (await link.until_end("a2")).reason == node_pb2.END_REASON_COMPLETED


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("paused", "paused"),
        ("draining", "draining"),
        ("no slot", "1 slots"),
        ("no replica", "no ready engine"),
        ("owner's limit", "1 slots"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_its_reason(coordinator, engine, tmp_path, case: str, words: str) -> None:
    limits = {"slot_count_max": 1} if case == "owner's limit" else {}
    async with wired_node(coordinator, tmp_path, engine.url, slot_count=1 if case == "no slot" else 4, **limits) as node:
        link = await coordinator.next_link()
        await link.welcome()
        node.report.state = {"paused": NodeState.PAUSED, "draining": NodeState.DRAINING}.get(case, NodeState.SERVING)
        await link.start("a1", replica_id="r9" if case == "no replica" else "r1")
        if case in {"no slot", "owner's limit"}:
            await engine.next_conversation()
            await link.start("a2")
        refused = "a2" if case in {"no slot", "owner's limit"} else "a1"
        end = await link.until_end(refused)
        assert end.reason == node_pb2.END_REASON_REFUSED
        assert words in end.detail
        assert link.chunks(refused) == []


async def test_an_engine_that_breaks_off_fails_the_attempt_after_its_last_whole_event(coordinator, engine, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, engine.url):
        link = await coordinator.next_link()
        await link.welcome()
        await link.start("a1")
        talk = await engine.next_conversation()
        talk.say(event(1) + b"data: half")
        await link.until(lambda: link.data("a1"))
        talk.break_off()
        end = await link.until_end("a1")
        assert (end.reason, end.sequence) == (node_pb2.END_REASON_ENGINE_FAILED, 1)
        assert link.data("a1") == event(1)


async def test_an_engine_that_is_not_there_is_sent_nothing(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, "http://127.0.0.1:9"):
        link = await coordinator.next_link()
        await link.welcome()
        await link.start("a1")
        end = await link.until_end("a1")
        assert (end.reason, end.sequence) == (node_pb2.END_REASON_REFUSED, 0)


async def test_goodbye_reaches_the_coordinator_and_ends_the_run(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome()
        await link.until(lambda: link.frames)
        assert await node.link.say_goodbye(GoodbyeReason.STOPPING)
        await asyncio.wait_for(node.task, 10)
        goodbyes = [frame.goodbye.reason for frame in link.frames if frame.HasField("goodbye")]
        assert goodbyes == [node_pb2.GOODBYE_REASON_STOPPING]
        assert coordinator.links.empty()


async def test_a_revoked_node_stops_and_says_why(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome()
        await link.send(goodbye=goodbye_message(GoodbyeReason.REVOKED, "too\x1b[2J hot"))
        link.close()
        with pytest.raises(PotluckError, match=r"\(too \[2J hot\)") as raised:
            await asyncio.wait_for(node.task, 10)
        assert raised.value.code is ErrorCode.INVALID_CERTIFICATE


async def test_a_stopping_coordinator_is_dialled_again(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome()
        await link.send(goodbye=goodbye_message(GoodbyeReason.COORDINATOR_STOPPING))
        link.close()
        again = await coordinator.next_link()
        await again.welcome(epoch=2)
        await again.until(lambda: again.frames)
        assert node.link.session.epoch == 2


async def test_a_node_replaced_again_and_again_gives_way(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, None) as node:
        for _ in range(3):
            link = await coordinator.next_link()
            await link.welcome()
            await link.send(goodbye=goodbye_message(GoodbyeReason.REPLACED))
            link.close()
        with pytest.raises(PotluckError) as raised:
            await asyncio.wait_for(node.task, 10)
        assert raised.value.code is ErrorCode.ALREADY_EXISTS


async def test_a_coordinator_that_is_away_is_dialled_until_it_is_back(coordinator, tmp_path) -> None:
    async with wired_node(coordinator, tmp_path, None) as node:
        for _ in range(2):
            link = await coordinator.next_link()
            link.close()
        link = await coordinator.next_link()
        await link.welcome()
        await link.until(lambda: link.frames)
        assert node.link.trouble == ""


async def test_a_coordinator_that_listens_and_answers_late_is_given_time_for_its_handshake(coordinator, tmp_path) -> None:
    """As one does to which a thousand nodes come back: who gives up after half a second and comes again makes it later still."""
    async with fault_proxy(coordinator.link_port) as proxy:
        coordinator.link_port = proxy.port
        proxy.downwards.latency_seconds = 0.7
        async with wired_node(coordinator, tmp_path, None) as node:
            link = await coordinator.next_link()
            await link.welcome()
            await link.until(lambda: link.frames)
            assert node.link.session.phase is Phase.SERVING
            assert node.link.session.failure_count == 2, "the third dial knows that somebody listens"
