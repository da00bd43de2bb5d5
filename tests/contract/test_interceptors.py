"""What every gRPC call goes through, over real sockets: all four arities, every way a call can end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import structlog

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.gateway import authorisation
from potluck_coordinator.gateway.authorisation import RPC_AUDIENCE, Audience
from potluck_coordinator.gateway.interceptors import CallInterceptor, caller, current_call
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import CATALOGUE, ErrorCode, PotluckError
from potluck_protocol.metadata import ERROR_DETAIL, REQUEST_ID
from potluck_protocol.v1 import common_pb2
from potluck_protocol.values import AccountId, KeyPrefix
from tests.support.grpc_edge import everybody_is_enrolled

USER_KEY = "sk-potluck-useruser-" + "u" * 43
OPERATOR_KEY = "sk-potluck-operoper-" + "o" * 43
CANARY = "canary-7391"
ARITIES = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]

Work = Callable[[], Awaitable[None]]


async def authenticate(secret: str) -> KeyIdentity:
    match secret:
        case k if k == USER_KEY:
            return KeyIdentity(KeyPrefix("useruser"), AccountId("acct_user"), operator=False, expires_at_unix_ms=0)
        case k if k == OPERATOR_KEY:
            return KeyIdentity(KeyPrefix("operoper"), AccountId("acct_operator"), operator=True, expires_at_unix_ms=0)
    raise PotluckError(ErrorCode.INVALID_API_KEY)


class Served:
    """One server with a service of every arity, whose methods run `work` and answer with their caller."""

    def __init__(self) -> None:
        self.work: Work = self._nothing
        self.closed = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.channel: grpc.aio.Channel
        self.server: grpc.aio.Server

    async def _nothing(self) -> None:
        return

    async def start(self) -> None:
        keys = KeyCache(authenticate, lambda: 1, SystemClock())
        self.server = grpc.aio.server(interceptors=(CallInterceptor(keys, dict, everybody_is_enrolled, SystemClock()),))
        handlers = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self._one),
            "stream_unary": grpc.stream_unary_rpc_method_handler(self._one),
            "unary_stream": grpc.unary_stream_rpc_method_handler(self._many),
            "stream_stream": grpc.stream_stream_rpc_method_handler(self._written),
            "operators": grpc.unary_unary_rpc_method_handler(self._one),
            "nodes": grpc.unary_unary_rpc_method_handler(self._one),
            "unlisted": grpc.unary_unary_rpc_method_handler(self._one),
            "anyone": grpc.unary_unary_rpc_method_handler(self._open),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.S", handlers),))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    async def _one(self, request: object, context: object) -> bytes:
        await self.work()
        return f"{caller().account_id} {current_call().request_id}".encode()

    async def _open(self, request: object, context: object) -> bytes:
        assert current_call().identity is None
        return b"open"

    async def _many(self, request: object, context: object) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await self.work()
            yield caller().account_id.encode()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.closed.set()

    async def _written(self, requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """As the link's servicer: it reads and writes for itself."""
        assert await context.read() == b"hello"
        await context.write(b"first")
        await self.work()
        await context.write(caller().account_id.encode())

    def start_call(self, method: str, key: str | None = USER_KEY, **metadata: str) -> Any:
        pairs = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        if key is not None:
            pairs.append(("authorization", f"Bearer {key}"))
        arity = method if method in ARITIES else "unary_unary"
        request: object = iter([b"hello"]) if arity.startswith("stream") else b"hello"
        return getattr(self.channel, arity)(f"/test.S/{method}")(request, metadata=tuple(pairs))

    async def call(self, method: str, key: str | None = USER_KEY, **metadata: str) -> list[bytes]:
        call = self.start_call(method, key, **metadata)
        if method.endswith("_stream"):
            return [message async for message in call]
        return [await call]


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    rows = {f"/test.S/{arity}": Audience.USER for arity in ARITIES}
    rows |= {"/test.S/operators": Audience.OPERATOR, "/test.S/nodes": Audience.NODE, "/test.S/anyone": Audience.ANYONE}
    for name, audience in rows.items():
        monkeypatch.setitem(authorisation.RPC_AUDIENCE, name, audience)
    served = Served()
    await served.start()
    yield served
    await served.channel.close()
    await served.server.stop(0)


def test_the_rows_are_taken_back() -> None:
    assert not any(name.startswith("/test.S") for name in RPC_AUDIENCE)


async def failure(call: Awaitable[object]) -> tuple[grpc.StatusCode, common_pb2.ErrorDetail, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailing = dict(caught.value.trailing_metadata() or ())
    detail = common_pb2.ErrorDetail()
    raw = trailing.get(ERROR_DETAIL, b"")
    assert isinstance(raw, bytes)
    detail.ParseFromString(raw)
    if detail.code:
        assert trailing[REQUEST_ID] == detail.request_id
    return caught.value.code(), detail, caught.value.details() or ""


@pytest.mark.parametrize("arity", ARITIES)
async def test_a_good_key_passes_and_the_servicer_knows_whose(served: Served, arity: str) -> None:
    assert (await served.call(arity))[-1].split()[0] == b"acct_user"
    assert (await served.call(arity, OPERATOR_KEY))[-1].split()[0] == b"acct_operator"


@pytest.mark.parametrize("arity", ARITIES)
@pytest.mark.parametrize("key", [None, "garbage", "sk-potluck-unknown1-" + "x" * 43])
async def test_no_good_key_is_stopped_before_the_servicer(served: Served, arity: str, key: str | None) -> None:
    async def reached() -> None:
        pytest.fail("the servicer was reached")

    served.work = reached
    status, detail, _ = await failure(served.call(arity, key))
    assert (status, detail.code) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
    assert not served.closed.is_set()


@pytest.mark.parametrize("arity", ARITIES)
async def test_a_known_failure_keeps_its_place_in_the_catalogue(served: Served, arity: str) -> None:
    async def fail() -> None:
        raise PotluckError(ErrorCode.QUEUE_FULL, "The queue is full; zurück.", param="model", retry_after_seconds=1.5)

    served.work = fail
    status, detail, text = await failure(served.call(arity, x_request_id="mine-1"))
    assert status is CATALOGUE[ErrorCode.QUEUE_FULL].grpc_status
    assert text == detail.message == "The queue is full; zurück."
    assert (detail.code, detail.param, detail.retry_after_ms, detail.request_id) == ("queue_full", "model", 1500, "mine-1")


@pytest.mark.parametrize("code", list(ErrorCode))
async def test_every_code_has_its_status(served: Served, code: ErrorCode) -> None:
    async def fail() -> None:
        raise PotluckError(code)

    served.work = fail
    status, detail, text = await failure(served.call("unary_unary"))
    assert (status, detail.code, text) == (CATALOGUE[code].grpc_status, str(code), CATALOGUE[code].public_text)


@pytest.mark.parametrize("arity", ARITIES)
async def test_an_unknown_failures_words_stay_inside(served: Served, arity: str) -> None:
    async def fail() -> None:
        raise ValueError(f"cannot parse {CANARY}")

    served.work = fail
    with structlog.testing.capture_logs() as lines:
        status, detail, text = await failure(served.call(arity))
    assert (status, detail.code, text) == (grpc.StatusCode.INTERNAL, "internal_error", CATALOGUE[ErrorCode.INTERNAL_ERROR].public_text)
    assert CANARY not in str(detail)
    assert CANARY not in str([{**line, "stack": None} for line in lines])
    (unexpected,) = [line for line in lines if line["event"] == "grpc_call_failed_unexpectedly"]
    assert unexpected["error_id"] == detail.request_id
    assert unexpected["error_type"] == "ValueError"


async def test_too_long_texts_are_cut_before_they_break_the_metadata(served: Served) -> None:
    async def fail() -> None:
        raise PotluckError(ErrorCode.INVALID_REQUEST, "é" * 100_000)

    served.work = fail
    status, detail, _ = await failure(served.call("unary_unary"))
    assert (status, detail.code) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")


async def test_request_ids_are_taken_over_only_where_they_are_harmless(served: Served) -> None:
    assert (await served.call("unary_unary", x_request_id="job-7.a_b"))[0] == b"acct_user job-7.a_b"
    for bad in ("", "a b", "x" * 65, "a/b"):
        assert (await served.call("unary_unary", x_request_id=bad))[0].startswith(b"acct_user req_")
    call = served.start_call("unary_unary", x_request_id="abc")
    await call
    assert dict(await call.trailing_metadata())[REQUEST_ID] == "abc"


async def test_the_table_is_the_law(served: Served) -> None:
    assert (await served.call("operators", OPERATOR_KEY))[0].startswith(b"acct_operator")
    status, detail, _ = await failure(served.call("operators"))
    assert (status, detail.code) == (grpc.StatusCode.PERMISSION_DENIED, "permission_denied")
    for key in (None, USER_KEY, OPERATOR_KEY):
        status, detail, _ = await failure(served.call("nodes", key))
        assert (status, detail.code) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_certificate")
        status, _, _ = await failure(served.call("unlisted", key))
        assert status is grpc.StatusCode.PERMISSION_DENIED
        status, _, _ = await failure(served.call("missing", key))
        assert status is grpc.StatusCode.UNIMPLEMENTED
        assert await served.call("anyone", key) == [b"open"]


async def test_a_client_that_goes_ends_the_servicer_at_once(served: Served) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    served.work = hang
    call = served.start_call("unary_stream")
    with structlog.testing.capture_logs() as lines:
        assert await call.read() == b"first"
        call.cancel()
        async with asyncio.timeout(10):
            await served.closed.wait()
        await asyncio.sleep(0)
    assert served.cancelled.is_set()
    assert [line["outcome"] for line in lines] == ["cancelled"]


async def test_one_line_per_call_without_secrets(served: Served) -> None:
    with structlog.testing.capture_logs() as lines:
        await served.call("unary_unary", x_request_id="abc")
        await failure(served.call("unary_unary", "sk-potluck-secret"))
    assert [(line["event"], line["outcome"], line["account_id"]) for line in lines] == [
        ("grpc_call", "ok", "acct_user"),
        ("grpc_call", "invalid_api_key", None),
    ]
    assert "secret" not in str(lines)
    assert USER_KEY not in str(lines)
