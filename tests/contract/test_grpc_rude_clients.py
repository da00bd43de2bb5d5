"""The grpc port against callers who say nothing, say too much, or do not read: whatever they do, others are served."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.gateway import grpc_server, interceptors
from potluck_coordinator.gateway.authorisation import contract_methods
from tests.support.grpc_edge import (
    BODY,
    CLOCK,
    OPERATOR_KEY,
    USER_KEY,
    GrpcEdge,
    ScriptedRequests,
    authorization,
    code_in,
    failure_code,
)

PREFIX = "/potluck_protocol.v1."
GENERATE = f"{PREFIX}InferenceService/Generate"
JOINER_METHODS = [f"{PREFIX}EnrolmentService/Join", f"{PREFIX}EnrolmentService/Renew"]
OTHERS = (f"{PREFIX}NodeService/", f"{PREFIX}GatewayService/")
KEY_METHODS = sorted(method for method in contract_methods() - {*JOINER_METHODS} if not method.startswith(OTHERS))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.load_or_create(tmp_path_factory.mktemp("pool") / "ca", CLOCK.unix_ms())


def silent_call(channel: grpc.aio.Channel, method: str, key: str | None = None) -> Any:
    """A call whose head is sent and nothing else; its client's side stays open."""
    return channel.stream_stream(method)(metadata=authorization(key))


async def end_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """How the server ends a call by itself."""
    async with asyncio.timeout(5):
        return await call.code(), code_in(await call.trailing_metadata())


@pytest.mark.parametrize("method", KEY_METHODS)
async def test_who_has_no_good_key_hears_so_before_saying_anything(authority: CertificateAuthority, method: str) -> None:
    async with GrpcEdge(authority) as edge:
        for key in (None, "garbage", "sk-potluck-unknown1-" + "x" * 43):
            call = silent_call(edge.channel, method, key)
            assert await end_of(call) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")


async def test_a_user_hears_so_as_soon_where_the_operators_key_is_needed(authority: CertificateAuthority) -> None:
    async with GrpcEdge(authority) as edge:
        call = silent_call(edge.channel, f"{PREFIX}AccountService/ListAccounts", USER_KEY)
        assert await end_of(call) == (grpc.StatusCode.PERMISSION_DENIED, "permission_denied")


async def test_silent_callers_without_a_key_hold_no_place(authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "CALLS_MAX", 2)
    async with GrpcEdge(authority) as edge:
        for call in [silent_call(edge.channel, GENERATE) for _ in range(4)]:
            assert (await end_of(call))[0] in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        async with asyncio.timeout(5):
            # A place is free again a moment after its caller was refused.
            while await finds_the_port_full(edge.generate()):
                await asyncio.sleep(0.01)


async def test_one_account_has_a_part_of_the_places(authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "CALLS_PER_ACCOUNT_MAX", 2)
    async with GrpcEdge(authority) as edge:
        calls = [silent_call(edge.channel, GENERATE, USER_KEY) for _ in range(3)]
        ends = [asyncio.ensure_future(end_of(call)) for call in calls]
        done, waiting = await asyncio.wait(ends, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert [end.result() for end in done] == [(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full")]
        # Others do not notice.
        other = silent_call(edge.channel, f"{PREFIX}AccountService/AuditLedger", OPERATOR_KEY)
        await other.done_writing()
        assert await end_of(other) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        for end, call in zip(ends, calls, strict=True):
            end.cancel()
            call.cancel()
        assert len(waiting) == 2
        async with asyncio.timeout(5):
            while await finds_the_port_full(edge.generate()):
                await asyncio.sleep(0.01)


async def finds_the_port_full(call: Any) -> bool:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return True
        raise
    return False


async def test_callers_who_need_no_key_have_few_places(authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "UNIDENTIFIED_CALLS_MAX", 2)
    async with GrpcEdge(authority) as edge:
        calls = [silent_call(edge.channel, method) for method in JOINER_METHODS * 3]
        ends = {asyncio.ensure_future(end_of(call)): call for call in calls}
        for number, end in enumerate(asyncio.as_completed(ends), 1):
            assert await end == (grpc.StatusCode.UNAVAILABLE, "coordinator_unavailable")
            if number == len(calls) - 2:
                break
        # Whoever has a key does not notice.
        assert not await finds_the_port_full(edge.generate())
        waiting = [end for end in ends if not end.done()]
        assert len(waiting) == 2
        for end in waiting:
            end.cancel()
            ends[end].cancel()
        async with asyncio.timeout(5):
            # Their places are free again a moment after they went.
            while await edge.channel.unary_unary(JOINER_METHODS[0])(b"").code() is grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "key"),
    [(GENERATE, USER_KEY), (f"{PREFIX}AccountService/AuditLedger", OPERATOR_KEY), (JOINER_METHODS[0], None)],
    ids=["a user's", "the operator's", "a joiner's"],
)
async def test_a_message_is_not_waited_for_without_end(
    authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch, method: str, key: str | None
) -> None:
    monkeypatch.setattr(interceptors, "BODY_SECONDS_MAX", 0.05)
    async with GrpcEdge(authority) as edge:
        call = silent_call(edge.channel, method, key)
        assert await end_of(call) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        assert "did not arrive" in await call.details()


async def test_a_call_that_ends_without_its_message_is_answered(authority: CertificateAuthority) -> None:
    async with GrpcEdge(authority) as edge:
        call = silent_call(edge.channel, GENERATE, USER_KEY)
        await call.done_writing()
        assert await end_of(call) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")


@pytest.mark.parametrize(("method", "key"), [(GENERATE, USER_KEY), (JOINER_METHODS[0], None)], ids=["a user's", "a joiner's"])
async def test_a_message_that_cannot_be_read_is_refused_in_our_words(authority: CertificateAuthority, method: str, key: str | None) -> None:
    async with GrpcEdge(authority) as edge:
        call = edge.channel.unary_unary(method)(b"\xff\xff\xff", metadata=authorization(key))
        assert await end_of(call) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        assert await call.details() == "The call's message is not one of this method."


async def test_a_large_message_with_a_wrong_key_is_refused_as_any_other(authority: CertificateAuthority) -> None:
    async with GrpcEdge(authority) as edge:
        assert await failure_code(edge.generate(BODY + b" " * 6_000_000, key="garbage")) == ("invalid_api_key", [])
        assert edge.requests.answers == []


async def test_one_connection_gets_a_share_of_the_calls(authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "CALLS_PER_CONNECTION_MAX", 2)
    async with GrpcEdge(authority, ScriptedRequests(hangs=True)) as edge, edge.new_channel() as other:
        calls = [edge.generate() for _ in range(2)]
        for call in calls:
            await call.read()
        waiting = edge.generate()
        reading = asyncio.ensure_future(waiting.read())
        await edge.generate(channel=other).read()
        assert len(edge.requests.answers) == 3
        assert not reading.done()
        calls[0].cancel()
        async with asyncio.timeout(5):
            assert (await reading).HasField("placed")


async def test_an_answer_that_nobody_reads_is_given_up(authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "STALL_SECONDS_MAX", 0.2)
    async with GrpcEdge(authority, ScriptedRequests(pieces=(b"x" * 65536,), repeats=5000)) as edge:
        call = edge.generate()
        async with asyncio.timeout(5):
            await edge.requests.began.wait()
            (answer,) = edge.requests.answers
            await answer.closed.wait()
        assert answer.taken_count < 500
        call.cancel()
