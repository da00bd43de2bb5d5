"""The node's certificate and its link: renewed before its time, after it, and with nowhere to keep it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from potluck_node import link as link_module
from potluck_node.domain.session import Phase
from potluck_node.identity_store import StateFolder
from potluck_protocol.codec import goodbye_message
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import node_id_of_certificate
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import GoodbyeReason
from tests.support.link_coordinator import LinkCoordinator, link_coordinator
from tests.support.node_engine import directed_engine, wired_node

HOUR_MS = 3_600_000


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[LinkCoordinator]:
    async with link_coordinator(tmp_path) as running:
        yield running


async def test_a_node_refused_at_the_door_asks_once_for_a_new_certificate_and_then_stops(coordinator, tmp_path) -> None:
    coordinator.refuse_links = coordinator.refuse_renewals = True
    async with wired_node(coordinator, tmp_path, None) as node:
        with pytest.raises(PotluckError) as raised:
            await asyncio.wait_for(node.task, 5)
        assert raised.value.code is ErrorCode.INVALID_CERTIFICATE


async def test_a_renewed_certificate_moves_the_link_and_the_attempt_goes_on(coordinator, tmp_path) -> None:
    state = StateFolder(tmp_path / "node")
    # Seventeen of its twenty-four hours are over: a new one is due.
    coordinator.enrol(state, issued_at_unix_ms=coordinator.clock.unix_ms() - 17 * HOUR_MS)
    former_certificate = state.certificate()
    async with directed_engine() as engine, wired_node(coordinator, tmp_path, engine.url) as node:
        link = await coordinator.next_link()
        await link.welcome(epoch=5)
        await link.start("a1")
        talk = await engine.next_conversation()
        talk.say(b"data: 0\n\n")
        asked = await link.until(lambda: next((f for f in link.frames if f.HasField("certificate_request")), None))
        renewed = await coordinator.Renew(
            node_pb2.RenewRequest(certificate_request_der=asked.certificate_request.certificate_request_der), None
        )
        await link.until(lambda: link.data("a1"))
        await link.send(certificate=node_pb2.Certificate(certificate_pem=renewed.certificate_pem))
        moved = await coordinator.next_link()
        assert [attempt.attempt_id for attempt in moved.hello.in_flight] == ["a1"]
        talk.say(b"data: 1\n\n")
        # The coordinator closes the former link first: that must not look like another agent.
        await link.send(goodbye=goodbye_message(GoodbyeReason.REPLACED))
        link.close()
        await moved.welcome(epoch=5, resume={"a1": len(link.chunks("a1"))})
        talk.say(b"data: 2\n\n")
        talk.finish()
        end = await moved.until_end("a1")
        chunks = link.chunks("a1") + moved.chunks("a1")
        assert [chunk.sequence for chunk in chunks] == list(range(end.sequence))
        assert b"".join(chunk.data for chunk in chunks) == b"data: 0\n\n" + b"data: 1\n\n" + b"data: 2\n\n"
        assert state.certificate() == renewed.certificate_pem.encode() != former_certificate
        assert not node.task.done()


async def test_a_lapsed_certificate_is_renewed_by_proof_of_the_key_before_dialling(coordinator, tmp_path) -> None:
    state = StateFolder(tmp_path / "node")
    coordinator.enrol(state, issued_at_unix_ms=coordinator.clock.unix_ms() - 30 * HOUR_MS)
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome()
        await link.until(lambda: link.frames)
        assert node.link.session.phase is Phase.SERVING


@pytest.mark.parametrize("content", [b"", b"garbage\n", None], ids=["empty", "garbage", "missing"])
async def test_a_node_without_a_certificate_keeps_its_identity_and_comes_back_with_its_key(coordinator, tmp_path, content) -> None:
    state = StateFolder(tmp_path / "node")
    identity = coordinator.enrol(state)
    (state.path / "node.crt").unlink()
    if content is not None:
        (state.path / "node.crt").write_bytes(content)
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome()
        await link.until(lambda: link.frames)
        assert node.link.session.phase is Phase.SERVING
    assert node_id_of_certificate(state.certificate(), coordinator.clock.unix_ms()) == identity.node_id


async def test_a_full_disk_keeps_a_renewed_certificate_in_memory_and_the_node_serving(coordinator, tmp_path, monkeypatch) -> None:
    state = StateFolder(tmp_path / "node")
    coordinator.enrol(state, issued_at_unix_ms=coordinator.clock.unix_ms() - 30 * HOUR_MS)
    lapsed_certificate = state.certificate()

    def full(_folder: StateFolder, _certificate_pem: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StateFolder, "write_certificate", full)
    async with wired_node(coordinator, tmp_path, None) as node:
        link = await coordinator.next_link()
        await link.welcome()
        await link.until(lambda: link.frames)
        assert node.link.session.phase is Phase.SERVING
    assert state.certificate() == lapsed_certificate


async def test_a_move_that_fails_is_tried_again_at_the_same_gateway_which_has_the_answers(coordinator, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(link_module, "MOVE_REPEATED_SECONDS", 0.05)
    async with link_coordinator(tmp_path) as another, directed_engine() as engine, wired_node(coordinator, tmp_path, engine.url) as node:
        link = await coordinator.next_link()
        await link.welcome(epoch=5, link_addresses=tuple(f"127.0.0.1:{one.link_port}" for one in (coordinator, another)))
        await link.start("a1")
        (await engine.next_conversation()).say(b"data: 0\n\n")
        await link.until(lambda: link.data("a1"))
        coordinator.come_again_seconds = 0.01
        node.link.introduce_again()
        moved = await coordinator.next_link()
        assert [attempt.attempt_id for attempt in moved.hello.in_flight] == ["a1"]
        assert another.links.empty()
