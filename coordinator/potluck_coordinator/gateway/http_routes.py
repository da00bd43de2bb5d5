"""What the http port answers, and to whom: one bare ASGI callable.

Decides which handler serves a path and writes the one log line of every request that gets here (at debug, where machines ask every few
seconds). `key_cache` says whose key a request carries, and `http_inference` serves what is asked of a model; the connection document, by
which nodes and the SDK find the other ports, is served from here. Who may call what is `authorisation.HTTP_ROUTES`; a row without a
handler, or a handler without a row, fails the start. It must not know links, the ledger or the directory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import msgspec
import structlog

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.gateway.authorisation import HTTP_ROUTES, Audience, require
from potluck_coordinator.gateway.edges import log_unexpected
from potluck_coordinator.gateway.http_exchange import ClientGoneError, Exchange, Message, Receive, Send
from potluck_coordinator.gateway.http_inference import InferenceExchange, KeyedRequests, Requests
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.requests import ModelView
from potluck_coordinator.metrics import CONTENT_TYPE, Metrics
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import AUTHORIZATION, CONNECTION_PATH
from potluck_protocol.values import Endpoint, ModelId

_log = structlog.get_logger()

_MODEL_PREFIX: Final = "/v1/models/"
_MODEL_PATTERN: Final = "/v1/models/{model_id}"
_UNKNOWN_PATTERN: Final = "other"
_QUIET_PATTERNS: Final = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines."""

_encoder: Final = msgspec.json.Encoder()


class _PoolFacts(msgspec.Struct):
    """Potluck's own words on a model, under one key so that they never meet OpenAI's."""

    ready_replica_count: int
    prompt_price_micro_credits: int
    completion_price_micro_credits: int
    licence: str
    endpoints: list[str]


class _ModelItem(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    pool: _PoolFacts
    object: str = "model"
    owned_by: str = "potluck"


class _ModelList(msgspec.Struct):
    data: list[_ModelItem]
    object: str = "list"


@dataclass(slots=True)
class _Record:
    """What the log line of one request says."""

    pattern: str = _UNKNOWN_PATTERN
    identity: KeyIdentity | None = None
    inference: InferenceExchange | None = None


_Handler: TypeAlias = Callable[[Exchange, _Record], Awaitable[None]]


class HttpRoutes:
    """The ASGI application of the http port.

    Args:
        requests: serves inference and lists models.
        keys: whose API key it is.
        connection_document: the JSON of `/pool/v1/connection`.
        metrics: counts, and is shown.
        clock: for durations.
        keyed: serves inference for whoever names an idempotency key.
    """

    def __init__(
        self, requests: Requests, keys: KeyCache, connection_document: bytes, metrics: Metrics, clock: Clock, *, keyed: KeyedRequests
    ) -> None:
        self._requests = requests
        self._keyed = keyed
        self._keys = keys
        self._connection_document = connection_document
        self._metrics = metrics
        self._clock = clock
        self._handlers: dict[str, dict[str, _Handler]] = {
            "/v1/models": {"GET": self._list_models},
            _MODEL_PATTERN: {"GET": self._get_model},
            **{endpoint.value: {"POST": partial(self._infer, endpoint=endpoint)} for endpoint in Endpoint},
            CONNECTION_PATH: {"GET": self._connection},
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/metrics": {"GET": self._show_metrics},
        }
        served = {(method, pattern) for pattern, methods in self._handlers.items() for method in methods}
        if served != HTTP_ROUTES.keys():
            raise RuntimeError(f"authorisation.HTTP_ROUTES and the handlers differ in {sorted(served ^ HTTP_ROUTES.keys())}")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one request; nothing but a cancellation ever leaves it."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, self._clock)
        record = _Record()
        try:
            await self._serve(exchange, record)
        except PotluckError as error:
            await exchange.fail(error)
        except ClientGoneError:
            await exchange.hang_up()
        except Exception as error:  # noqa: BLE001 - the last place before the wire
            log_unexpected("http_request_failed_unexpectedly", exchange.request_id, error)
            await exchange.fail(PotluckError(ErrorCode.INTERNAL_ERROR))
        finally:
            self._finish(exchange, record)

    async def _serve(self, exchange: Exchange, record: _Record) -> None:
        pattern = _MODEL_PATTERN if exchange.path.startswith(_MODEL_PREFIX) else exchange.path
        methods = self._handlers.get(pattern)
        if methods is None:
            raise PotluckError(ErrorCode.NOT_FOUND, "There is no such path here. The API is under /v1.")
        record.pattern = pattern
        # HEAD is GET whose body the server leaves out: what watches over a port often asks so.
        method = "GET" if exchange.method == "HEAD" else exchange.method
        handler = methods.get(method)
        if handler is None:
            allowed = ", ".join(methods)
            refusal = PotluckError(ErrorCode.METHOD_NOT_ALLOWED, f"This path takes {allowed}.")
            await exchange.fail(refusal, ((b"allow", allowed.encode()),))
            return
        audience = HTTP_ROUTES[method, pattern]
        if audience is not Audience.ANYONE:
            record.identity = await self._keys.identify(exchange.header(AUTHORIZATION.encode()))
            require(record.identity, audience)
        await handler(exchange, record)

    async def _infer(self, exchange: Exchange, record: _Record, *, endpoint: Endpoint) -> None:
        assert record.identity is not None, "the table lets nobody in here without a key"
        record.inference = InferenceExchange(exchange, self._requests, self._keyed, self._metrics)
        await record.inference.serve(endpoint, record.identity)

    async def _list_models(self, exchange: Exchange, _record: _Record) -> None:
        await exchange.reply_json(_encoder.encode(_ModelList([_model_item(view) for view in self._requests.models()])))

    async def _get_model(self, exchange: Exchange, _record: _Record) -> None:
        model_id = ModelId(exchange.path.removeprefix(_MODEL_PREFIX))
        for view in self._requests.models():
            if view.entry.model_id == model_id:
                await exchange.reply_json(_encoder.encode(_model_item(view)))
                return
        message = "The pool has no model of that name; `potluck models` and GET /v1/models list those it has."
        raise PotluckError(ErrorCode.MODEL_NOT_FOUND, message, param="model")

    async def _connection(self, exchange: Exchange, _record: _Record) -> None:
        await exchange.reply_json(self._connection_document, ((b"cache-control", b"no-store"),))

    async def _health(self, exchange: Exchange, _record: _Record) -> None:
        """This process answers; it says nothing about nodes."""
        await exchange.reply_json(b'{"status":"ok"}')

    async def _ready(self, exchange: Exchange, _record: _Record) -> None:
        """Whether any model can be asked for right now."""
        ready_count = sum(view.ready_replica_count > 0 for view in self._requests.models())
        if ready_count == 0:
            raise PotluckError(ErrorCode.NO_CAPACITY, "No model has a ready replica yet.")
        await exchange.reply_json(b'{"status":"ready","ready_model_count":%d}' % ready_count)

    async def _show_metrics(self, exchange: Exchange, _record: _Record) -> None:
        await exchange.reply(200, CONTENT_TYPE.encode(), self._metrics.render())

    def _finish(self, exchange: Exchange, record: _Record) -> None:
        """The one log line and the counts of a request that is over. Never a prompt, an answer or a secret."""
        self._metrics.observe_request(record.pattern, exchange.status, exchange.seconds)
        fields: dict[str, object] = {}
        inference = record.inference
        if inference is not None:
            inference.observe()
            usage = inference.usage
            fields = {
                "model_id": inference.model_id if inference.node_id else None,
                "node_id": inference.node_id,
                "stream": exchange.streaming,
                **({"is_replay": True} if inference.is_replay else {}),
                "prompt_token_count": usage.prompt_token_count if usage else None,
                "completion_token_count": usage.completion_token_count if usage else None,
                "charge_micro_credits": inference.charge_micro_credits,
                "first_byte_ms": None if exchange.first_byte_seconds is None else round(exchange.first_byte_seconds * 1000, 1),
            }
        exchange.let_go()
        write = _log.debug if record.pattern in _QUIET_PATTERNS else _log.info
        write(
            "http_request",
            request_id=exchange.request_id,
            method=exchange.method,
            endpoint=record.pattern,
            status=exchange.status,
            outcome="ok" if exchange.failure is None else str(exchange.failure),
            account_id=record.identity.account_id if record.identity else None,
            duration_ms=round(exchange.seconds * 1000, 1),
            sent_bytes=exchange.sent_bytes,
            **fields,
        )


def _model_item(view: ModelView) -> _ModelItem:
    entry = view.entry
    return _ModelItem(
        id=entry.model_id,
        created=entry.created_at_unix_seconds,
        max_model_len=entry.context_length_tokens,
        pool=_PoolFacts(
            ready_replica_count=view.ready_replica_count,
            prompt_price_micro_credits=entry.prompt_price_micro_credits,
            completion_price_micro_credits=entry.completion_price_micro_credits,
            licence=entry.licence,
            endpoints=[endpoint.value for endpoint in entry.endpoints],
        ),
    )
