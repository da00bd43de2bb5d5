"""`Client` and `AsyncClient`: the pool as a Python object.

Decides the names and defaults of the public calls. It must not know gRPC: `calls` says what is sent, `transport` sends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self, overload

from potluck import calls
from potluck.address import pool_address
from potluck.questions import ChatMessages, chat_messages, plain_prompt
from potluck.results import ChatResult, Credits, ModelInfo, NodeInfo
from potluck.streams import AsyncChatStream, ChatStream
from potluck.transport import ANSWER_TIMEOUT_SECONDS, AsyncTransport, Transport
from potluck_protocol.values import Endpoint, ModelId

_CHAT = Endpoint.CHAT_COMPLETIONS
_PROMPT = Endpoint.COMPLETIONS


class Client:
    """A pool, to be asked from any thread.

    Args:
        url: the coordinator's HTTP URL, as it prints it; else POTLUCK_URL.
        api_key: a key to the pool; else POTLUCK_API_KEY.
        timeout_seconds: the limit for one whole answer. Other calls end after 30 s, or sooner if this is less.

    Every call raises a `PoolError`: one class per code, all in `potluck`. The pool is dialled at the first call.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout_seconds: float = ANSWER_TIMEOUT_SECONDS) -> None:
        self._transport = Transport(pool_address(url, api_key), timeout_seconds)

    @overload
    def chat(
        self,
        messages: str | ChatMessages,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatResult: ...
    @overload
    def chat(
        self,
        messages: str | ChatMessages,
        *,
        model: str | None = None,
        stream: Literal[True],
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatStream: ...
    def chat(
        self,
        messages: str | ChatMessages,
        *,
        model: str | None = None,
        stream: bool = False,
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatResult | ChatStream:
        """A model's answer to a conversation.

        Args:
            messages: OpenAI's message list, or one question as a string.
            model: a model of the pool; None takes its first ready one.
            stream: True gives a `ChatStream` as soon as a node has the request.
            idempotency_key: a name of your own for this request, such as an order's number. Whoever sends the same request with the same
                key within a day gets the first answer again, which is made and paid for once, also if you have gone meanwhile. None: the
                tries of this one call share a key, and leaving a stream takes the request back.
            trusted_only: True keeps the request, wherever it goes on after a loss, to nodes that the pool's operator trusts
                (`NodeInfo.trusted`). Where none of them serves the model it is refused, with NoCapacityError, and runs nowhere else.
            openai_fields: any other field of OpenAI's request, passed on to the engine as it is.
        """
        return self._answer(
            _CHAT, model, stream, idempotency_key, {"messages": chat_messages(messages), **openai_fields}, trusted_only=trusted_only
        )

    @overload
    def complete(
        self,
        prompt: str,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatResult: ...
    @overload
    def complete(
        self,
        prompt: str,
        *,
        model: str | None = None,
        stream: Literal[True],
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatStream: ...
    def complete(
        self,
        prompt: str,
        *,
        model: str | None = None,
        stream: bool = False,
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatResult | ChatStream:
        """How a model goes on from a plain text; arguments as in `chat`."""
        return self._answer(
            _PROMPT, model, stream, idempotency_key, {"prompt": plain_prompt(prompt), **openai_fields}, trusted_only=trusted_only
        )

    def models(self) -> tuple[ModelInfo, ...]:
        """The pool's catalogue."""
        return self._transport.unary(calls.list_models())

    def nodes(self) -> tuple[NodeInfo, ...]:
        """The pool's nodes; owners are named to themselves and to the operator."""
        return self._transport.unary(calls.list_nodes())

    def credits(self) -> Credits:
        """The caller's balance."""
        return self._transport.unary(calls.get_balance())

    def close(self) -> None:
        """Closes the connection. May be called again."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _answer(
        self,
        endpoint: Endpoint,
        model: str | None,
        stream: bool,
        idempotency_key: str | None,
        fields: Mapping[str, Any],
        *,
        trusted_only: bool,
    ) -> ChatResult | ChatStream:
        chosen = ModelId(model) if model else calls.choose_model(self.models(), endpoint)
        request = calls.generate_request(endpoint, chosen, fields, stream=stream, trusted_only=trusted_only)
        opened = self._transport.open_answer(request, stream=stream, idempotency_key=idempotency_key)
        if stream:
            return opened
        with opened:
            return opened.result()


class AsyncClient:
    """`Client` for asyncio: the same calls, awaited. Belongs to the event loop that makes its first call."""

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout_seconds: float = ANSWER_TIMEOUT_SECONDS) -> None:
        self._transport = AsyncTransport(pool_address(url, api_key), timeout_seconds)

    @overload
    async def chat(
        self,
        messages: str | ChatMessages,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatResult: ...
    @overload
    async def chat(
        self,
        messages: str | ChatMessages,
        *,
        model: str | None = None,
        stream: Literal[True],
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> AsyncChatStream: ...
    async def chat(
        self,
        messages: str | ChatMessages,
        *,
        model: str | None = None,
        stream: bool = False,
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatResult | AsyncChatStream:
        """As `Client.chat`; streamed, the `AsyncChatStream` is awaited too."""
        return await self._answer(
            _CHAT, model, stream, idempotency_key, {"messages": chat_messages(messages), **openai_fields}, trusted_only=trusted_only
        )

    @overload
    async def complete(
        self,
        prompt: str,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatResult: ...
    @overload
    async def complete(
        self,
        prompt: str,
        *,
        model: str | None = None,
        stream: Literal[True],
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> AsyncChatStream: ...
    async def complete(
        self,
        prompt: str,
        *,
        model: str | None = None,
        stream: bool = False,
        idempotency_key: str | None = None,
        trusted_only: bool = False,
        **openai_fields: Any,
    ) -> ChatResult | AsyncChatStream:
        """As `Client.complete`."""
        return await self._answer(
            _PROMPT, model, stream, idempotency_key, {"prompt": plain_prompt(prompt), **openai_fields}, trusted_only=trusted_only
        )

    async def models(self) -> tuple[ModelInfo, ...]:
        """The pool's catalogue."""
        return await self._transport.unary(calls.list_models())

    async def nodes(self) -> tuple[NodeInfo, ...]:
        """The pool's nodes; owners are named to themselves and to the operator."""
        return await self._transport.unary(calls.list_nodes())

    async def credits(self) -> Credits:
        """The caller's balance."""
        return await self._transport.unary(calls.get_balance())

    async def close(self) -> None:
        """Closes the connection. May be called again."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()

    async def _answer(
        self,
        endpoint: Endpoint,
        model: str | None,
        stream: bool,
        idempotency_key: str | None,
        fields: Mapping[str, Any],
        *,
        trusted_only: bool,
    ) -> ChatResult | AsyncChatStream:
        chosen = ModelId(model) if model else calls.choose_model(await self.models(), endpoint)
        request = calls.generate_request(endpoint, chosen, fields, stream=stream, trusted_only=trusted_only)
        opened = await self._transport.open_answer(request, stream=stream, idempotency_key=idempotency_key)
        if stream:
            return opened
        async with opened:
            return await opened.result()
