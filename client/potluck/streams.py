"""Streamed answers as callers hold them: iterate for text, then ask for the result.

Decides when a stream is closed: at its end, at its failure, or when its block is left. It must not know how answers are decoded (`answer`)
or opened (`transport`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Final, Protocol, Self

import grpc

from potluck.answer import AnswerReader
from potluck.errors import PoolError, error_of_answer, pool_error
from potluck.results import ChatResult
from potluck_protocol.errors import ErrorCode
from potluck_protocol.v1.inference_pb2 import GenerateResponse
from potluck_protocol.values import ModelId, NodeId, RequestId


class SyncCall(Protocol):
    """What is used of grpc's call object."""

    def __iter__(self) -> Iterator[GenerateResponse]: ...
    def __next__(self) -> GenerateResponse: ...
    def cancel(self) -> Any: ...


class AsyncCall(Protocol):
    """What is used of grpc.aio's call object."""

    async def read(self) -> Any: ...
    def cancel(self) -> Any: ...


class _Answer:
    """What both kinds of stream show of an answer."""

    def __init__(self, reader: AnswerReader, timeout_seconds: float) -> None:
        self._reader: Final = reader
        self._timeout_seconds: Final = timeout_seconds
        self._waiting: deque[str] = deque()
        self._closed = False
        self._failure: PoolError | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return self._reader.text

    @property
    def request_id(self) -> RequestId:
        return self._reader.request_id

    @property
    def node_id(self) -> NodeId:
        """The node that answers; another one, where that went on with it."""
        return self._reader.node_id

    @property
    def model_id(self) -> ModelId:
        return self._reader.model_id

    def _failed(self, error: grpc.RpcError) -> PoolError:
        self._failure = self._reader.failure(error_of_answer(error, self._timeout_seconds, self.request_id))
        return self._failure

    def _complete(self) -> ChatResult:
        if self._failure is not None:
            raise self._failure
        try:
            return self._reader.result()
        except PoolError:
            if not self._closed:
                raise
            message = "The stream was closed before its answer was complete."
            raise self._reader.failure(pool_error(ErrorCode.CANCELLED, message)) from None


class ChatStream(_Answer):
    """A streamed answer. Iterating gives pieces of text as they come.

    Use it in a `with` block: leaving the block before the end takes the request back, and frees the engine.
    """

    def __init__(self, call: SyncCall, reader: AnswerReader, timeout_seconds: float) -> None:
        super().__init__(reader, timeout_seconds)
        self._call = call

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next piece of text; raises a `PoolError` that holds `partial_text` if the answer breaks off."""
        while not self._waiting:
            if self._closed:
                raise StopIteration
            self._read()
        return self._waiting.popleft()

    def result(self) -> ChatResult:
        """The complete answer; reads on to the end first."""
        while not self._closed:
            self._read()
        return self._complete()

    def close(self) -> None:
        """Takes the request back unless it is complete. May be called again."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _read(self) -> None:
        try:
            self._waiting += self._reader.read(next(self._call))
        except StopIteration:
            self.close()
        except grpc.RpcError as error:
            self.close()
            raise self._failed(error) from error
        except PoolError as error:
            self._failure = error
            self.close()
            raise
        except BaseException:
            self.close()
            raise


class AsyncChatStream(_Answer):
    """`ChatStream` for asyncio: `async with`, `async for`, `await stream.result()`."""

    def __init__(self, call: AsyncCall, reader: AnswerReader, timeout_seconds: float) -> None:
        super().__init__(reader, timeout_seconds)
        self._call = call

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        """The next piece of text; raises a `PoolError` that holds `partial_text` if the answer breaks off."""
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            await self._read()
        return self._waiting.popleft()

    async def result(self) -> ChatResult:
        """The complete answer; reads on to the end first."""
        while not self._closed:
            await self._read()
        return self._complete()

    async def close(self) -> None:
        """Takes the request back unless it is complete. May be called again."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()

    async def _read(self) -> None:
        try:
            message = await self._call.read()
            if message is grpc.aio.EOF:
                await self.close()
            else:
                self._waiting += self._reader.read(message)
        except grpc.RpcError as error:
            await self.close()
            raise self._failed(error) from error
        except PoolError as error:
            self._failure = error
            await self.close()
            raise
        except BaseException:
            await self.close()
            raise
