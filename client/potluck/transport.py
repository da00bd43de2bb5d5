"""How calls reach a pool: the connection document, one gRPC channel, time limits, tries.

Decides when to connect, and how long a call may take; `retry` says when it is made again. Connects, makes calls, and reads an answer's
first message, which says where it runs; `streams` reads the rest. It must not know what any other call means: `calls` builds them and reads
their replies.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from potluck.address import PoolAddress
from potluck.answer import AnswerReader
from potluck.calls import GENERATE_METHOD, Call, Reply, Result, read_reply
from potluck.errors import PoolError, error_of_answer, error_of_call, error_of_protocol, pool_error
from potluck.retry import Tries
from potluck.streams import AsyncChatStream, ChatStream
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.connection import ConnectionDocument, fetch_connection
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.idempotency_keys import checked_key
from potluck_protocol.metadata import AUTHORIZATION, IDEMPOTENCY_KEY, WHEN_GONE
from potluck_protocol.v1.inference_pb2 import GenerateRequest, GenerateResponse

ANSWER_TIMEOUT_SECONDS: Final = 600.0
"""For one whole answer, every try included."""
CALL_TIMEOUT_SECONDS: Final = 30.0
"""For every other call."""


def _connection(address: PoolAddress) -> ConnectionDocument:
    try:
        return fetch_connection(address.url)
    except PotluckError as error:
        raise error_of_protocol(error) from error


def _credentials(document: ConnectionDocument) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(root_certificates=document.ca_certificate_pem.encode())


_Metadata: TypeAlias = tuple[tuple[str, str], ...]


def _metadata(address: PoolAddress) -> _Metadata:
    return ((AUTHORIZATION, f"Bearer {address.api_key}"),)


def _answer_metadata(address: PoolAddress, idempotency_key: str | None) -> _Metadata:
    """Of all tries of one answer. A key of the SDK's own is for these tries only: nobody else will ask for what they leave behind."""
    if idempotency_key is None:
        return (*_metadata(address), (IDEMPOTENCY_KEY, uuid.uuid4().hex), (WHEN_GONE, "cancel"))
    try:
        return (*_metadata(address), (IDEMPOTENCY_KEY, checked_key(idempotency_key)))
    except PotluckError as error:
        raise error_of_protocol(error) from error


def _reader(first: Any, *, stream: bool) -> AnswerReader:
    """The reader of an answer whose first message this is."""
    if not isinstance(first, GenerateResponse) or first.WhichOneof("event") != "placed":
        raise pool_error(ErrorCode.INTERNAL_ERROR, "The coordinator's answer does not begin with where it runs.")
    return AnswerReader(first.placed, stream=stream)


class Transport:
    """Blocking calls; safe to share between threads. Connects at the first call."""

    def __init__(
        self,
        address: PoolAddress,
        timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
        *,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._clock: Clock = clock or SystemClock()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._document: ConnectionDocument | None = None

    def document(self) -> ConnectionDocument:
        """The pool's connection document; raises a `PoolError` where the pool cannot be reached or trusted."""
        with self._lock:
            if self._document is None:
                self._document = _connection(self._address)
            return self._document

    def unary(self, call: Call[Reply, Result]) -> Result:
        """The call's result; raises a `PoolError`."""
        limit_seconds = min(CALL_TIMEOUT_SECONDS, self._timeout_seconds)
        tries = Tries(self._clock, limit_seconds, repeatable=call.repeatable)
        while True:
            try:
                method = self._connected().unary_unary(
                    call.method, request_serializer=type(call.request).SerializeToString, response_deserializer=call.reply_type.FromString
                )
                reply = method(call.request, timeout=tries.remaining_seconds(), metadata=_metadata(self._address))
                return read_reply(call, reply)
            except grpc.RpcError as error:
                self._sleep(tries.delay_after(error_of_call(error, limit_seconds)))
            except PoolError as error:
                self._sleep(tries.delay_after(error))

    def open_answer(self, request: GenerateRequest, *, stream: bool, idempotency_key: str | None = None) -> ChatStream:
        """An answer whose place in the pool is settled; raises a `PoolError` where it got none. All tries name one key."""
        tries, metadata = Tries(self._clock, self._timeout_seconds, keyed=True), _answer_metadata(self._address, idempotency_key)
        while True:
            try:
                return self._opened(request, tries.remaining_seconds(), metadata, stream=stream)
            except PoolError as error:
                self._sleep(tries.delay_after(error))

    def close(self) -> None:
        """Closes the channel; running calls end as cancelled. May be called again."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _opened(self, request: GenerateRequest, limit_seconds: float, metadata: _Metadata, *, stream: bool) -> ChatStream:
        method = self._connected().unary_stream(
            GENERATE_METHOD, request_serializer=GenerateRequest.SerializeToString, response_deserializer=GenerateResponse.FromString
        )
        call = method(request, timeout=limit_seconds, metadata=metadata)
        try:
            return ChatStream(call, _reader(next(call, None), stream=stream), self._timeout_seconds)
        except grpc.RpcError as error:
            raise error_of_answer(error, self._timeout_seconds) from error
        except BaseException:
            call.cancel()
            raise

    def _connected(self) -> grpc.Channel:
        document = self.document()
        with self._lock:
            if self._channel is None:
                self._channel = grpc.secure_channel(document.grpc_target, _credentials(document), options=CHANNEL_OPTIONS)
            return self._channel


class AsyncTransport:
    """`Transport` for asyncio. Belongs to the event loop that makes its first call."""

    def __init__(self, address: PoolAddress, timeout_seconds: float = ANSWER_TIMEOUT_SECONDS, *, clock: Clock | None = None) -> None:
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._clock: Clock = clock or SystemClock()
        self._lock = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None

    async def unary(self, call: Call[Reply, Result]) -> Result:
        """The call's result; raises a `PoolError`."""
        limit_seconds = min(CALL_TIMEOUT_SECONDS, self._timeout_seconds)
        tries = Tries(self._clock, limit_seconds, repeatable=call.repeatable)
        while True:
            try:
                method = (await self._connected()).unary_unary(
                    call.method, request_serializer=type(call.request).SerializeToString, response_deserializer=call.reply_type.FromString
                )
                reply = await method(call.request, timeout=tries.remaining_seconds(), metadata=_metadata(self._address))
                return read_reply(call, reply)
            except grpc.RpcError as error:
                await asyncio.sleep(tries.delay_after(error_of_call(error, limit_seconds)))
            except PoolError as error:
                await asyncio.sleep(tries.delay_after(error))

    async def open_answer(self, request: GenerateRequest, *, stream: bool, idempotency_key: str | None = None) -> AsyncChatStream:
        """An answer whose place in the pool is settled; raises a `PoolError` where it got none. All tries name one key."""
        tries, metadata = Tries(self._clock, self._timeout_seconds, keyed=True), _answer_metadata(self._address, idempotency_key)
        while True:
            try:
                return await self._opened(request, tries.remaining_seconds(), metadata, stream=stream)
            except PoolError as error:
                await asyncio.sleep(tries.delay_after(error))

    async def close(self) -> None:
        """Closes the channel; running calls end as cancelled. May be called again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _opened(self, request: GenerateRequest, limit_seconds: float, metadata: _Metadata, *, stream: bool) -> AsyncChatStream:
        method = (await self._connected()).unary_stream(
            GENERATE_METHOD, request_serializer=GenerateRequest.SerializeToString, response_deserializer=GenerateResponse.FromString
        )
        call = method(request, timeout=limit_seconds, metadata=metadata)
        try:
            return AsyncChatStream(call, _reader(await call.read(), stream=stream), self._timeout_seconds)
        except grpc.RpcError as error:
            raise error_of_answer(error, self._timeout_seconds) from error
        except BaseException:
            call.cancel()
            raise

    async def _connected(self) -> grpc.aio.Channel:
        async with self._lock:
            if self._channel is None:
                document = await asyncio.to_thread(_connection, self._address)
                self._channel = grpc.aio.secure_channel(document.grpc_target, _credentials(document), options=CHANNEL_OPTIONS)
            return self._channel
