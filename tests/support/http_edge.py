"""The real http port on a real socket, in front of a request service whose answers the test writes down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.domain.catalogue import CatalogueEntry, ServiceTier
from potluck_coordinator.gateway.http_server import HttpServer
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_coordinator.gateway.rate_windows import Allowance
from potluck_coordinator.gateway.relay import PassOn
from potluck_coordinator.gateway.requests import ModelView
from potluck_coordinator.metrics import Metrics
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, Endpoint, KeyPrefix, ModelFile, ModelId, NodeId, Usage
from tests.support.key_desk import no_keys

USER_KEY = "sk-potluck-user0000-" + "u" * 43
OPERATOR_KEY = "sk-potluck-oper0000-" + "o" * 43
NODE_ID = NodeId("a" * 26)
MODEL_ID = ModelId("org/tiny-model")
ENTRY = CatalogueEntry(
    model_id=MODEL_ID,
    file=ModelFile(MODEL_ID, "path:/models", "tiny.gguf", "0" * 64, 1),
    engine_kinds=("scripted",),
    context_length_tokens=4096,
    slot_count=4,
    prompt_price_micro_credits=1,
    completion_price_micro_credits=2,
    licence="Apache-2.0",
    endpoints=tuple(Endpoint),
    created_at_unix_seconds=1_700_000_000,
)
CONNECTION_DOCUMENT = b'{"protocol_version":1}'
USAGE = Usage(12, 3, 4)
ALLOWANCE = Allowance(limit_count=100, remaining_count=99, reset_seconds=36.0, window_seconds=3600)
DONE = b"data: [DONE]\n\n"


def event(content: object) -> bytes:
    """One server-sent event as llama.cpp writes it."""
    return b"data: " + json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def chat_event(delta: dict[str, object], finish_reason: str | None = None, index: int = 0) -> bytes:
    """One chunk of a chat answer."""
    choice = {"finish_reason": finish_reason, "index": index, "delta": delta}
    return event({"choices": [choice], "created": 1, "id": "chatcmpl-1", "model": MODEL_ID, "object": "chat.completion.chunk"})


def usage_event(usage: Usage = USAGE) -> bytes:
    """The chunk that carries only usage."""
    record = {
        "completion_tokens": usage.completion_token_count,
        "prompt_tokens": usage.prompt_token_count,
        "total_tokens": usage.prompt_token_count + usage.completion_token_count,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_token_count},
    }
    return event({"choices": [], "created": 1, "id": "chatcmpl-1", "model": MODEL_ID, "object": "chat.completion.chunk", "usage": record})


CHAT_DOCUMENT = json.dumps(
    {
        "choices": [{"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": "Hello there"}}],
        "created": 1,
        "id": "chatcmpl-1",
        "model": MODEL_ID,
        "object": "chat.completion",
        "usage": {"completion_tokens": 3, "prompt_tokens": 12, "total_tokens": 15},
    }
).encode()
CHAT_STREAM = (chat_event({"role": "assistant", "content": None}), chat_event({"content": "Hello"}), chat_event({"content": " there"}))
CHAT_END = chat_event({}, "stop") + DONE


@dataclass
class Script:
    """What the next request meets. An error among the pieces ends the answer there; `endless` leaves it open after the last piece."""

    refusal: Exception | None = None
    pieces: tuple[bytes | Exception, ...] = ()
    endless: bool = False
    begins: bool = True
    repeats: int = 1
    usage: Usage | None = USAGE
    charge_micro_credits: int = 0


class ScriptedAnswer:
    """Keeps the promises of `gateway.answer.Answer` that an edge relies on."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._pieces = [*script.pieces] * script.repeats
        self.node_id = NODE_ID
        self.tier = ServiceTier.FLEX
        self.usage: Usage | None = None
        self.charge_micro_credits = 0
        self.taken_count = 0
        self.closed = asyncio.Event()

    @property
    def document(self) -> bytes:
        return b"".join(piece for piece in self._pieces[: self.taken_count] if isinstance(piece, bytes))

    async def next_data(self, pass_on: PassOn | None = None) -> bytes | None:
        while self.taken_count < len(self._pieces):
            piece = self._pieces[self.taken_count]
            self.taken_count += 1
            if isinstance(piece, Exception):
                raise piece
            if pass_on is None:
                return piece
            if not pass_on(piece):
                pass_on = None
        if self._script.endless:
            await asyncio.Event().wait()
        await self.close()
        return None

    async def close(self) -> None:
        self.usage = self._script.usage
        self.charge_micro_credits = self._script.charge_micro_credits
        self.closed.set()


@dataclass
class ScriptedRequests:
    """Stands where `gateway.requests.RequestService` stands."""

    script: Script = field(default_factory=Script)
    seen: list[InferenceRequest] = field(default_factory=list)
    answers: list[ScriptedAnswer] = field(default_factory=list)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    begin_cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    ready_replica_count: int = 1

    async def begin(self, request: InferenceRequest) -> ScriptedAnswer:
        self.seen.append(request)
        if self.script.refusal is not None:
            raise self.script.refusal
        if not self.script.begins:
            self.began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.begin_cancelled.set()
                raise
        answer = ScriptedAnswer(self.script)
        self.answers.append(answer)
        self.began.set()
        return answer

    def models(self) -> tuple[ModelView, ...]:
        return (ModelView(ENTRY, self.ready_replica_count),)

    def allowance(self, _account_id: AccountId) -> Allowance:
        return ALLOWANCE


async def authenticate(secret: str) -> KeyIdentity:
    """The directory's word on the two keys there are."""
    if secret not in {USER_KEY, OPERATOR_KEY}:
        raise PotluckError(ErrorCode.INVALID_API_KEY)
    return KeyIdentity(KeyPrefix(secret[11:19]), AccountId("acct_" + secret[11:15]), secret == OPERATOR_KEY, 0)


@dataclass
class HttpEdge:
    """A running http port."""

    server: HttpServer
    port: int
    requests: ScriptedRequests
    metrics: Metrics

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def http_edge(keyed: Callable[[ScriptedRequests], KeyedRequests] = no_keys, **settings: Path) -> AsyncIterator[HttpEdge]:
    """Serves until the block ends; `keyed` makes what serves requests with an idempotency key."""
    requests, metrics, clock = ScriptedRequests(), Metrics(), SystemClock()
    server = HttpServer(
        requests, KeyCache(authenticate, lambda: 1, clock), CONNECTION_DOCUMENT, metrics, clock, keyed=keyed(requests), **settings
    )
    port = await server.start("127.0.0.1", 0)
    try:
        yield HttpEdge(server, port, requests, metrics)
    finally:
        await server.stop(grace_seconds=1)


@dataclass(frozen=True)
class RawAnswer:
    """An HTTP answer, bytes for bytes."""

    status: int
    headers: dict[str, str]
    body: bytes


async def exchange(
    port: int,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    key: str | None = USER_KEY,
    headers: dict[str, str] | None = None,
) -> RawAnswer:
    """One request over its own socket, read to the connection's end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(method, path, body, key=key, headers={"connection": "close", **(headers or {})}))
    try:
        async with asyncio.timeout(10):
            raw = await reader.read()
    finally:
        writer.close()
    return parse_answer(raw)


async def read_until(reader: asyncio.StreamReader, mark: bytes) -> bytes:
    """What came up to and with the mark."""
    seen = b""
    async with asyncio.timeout(5):
        while mark not in seen:
            seen += await reader.read(65536)
    return seen


def request_bytes(method: str, path: str, body: bytes = b"", *, key: str | None = USER_KEY, headers: dict[str, str] | None = None) -> bytes:
    """A request as a client writes it."""
    fields = {"host": "pool", "content-length": str(len(body)), **(headers or {})}
    if key is not None:
        fields["authorization"] = f"Bearer {key}"
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def parse_answer(raw: bytes) -> RawAnswer:
    """Takes an answer apart, chunked or not."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        pieces = []
        while body:
            size, _, body = body.partition(b"\r\n")
            pieces.append(body[: int(size, 16)])
            body = body[int(size, 16) + 2 :]
        body = b"".join(pieces)
    return RawAnswer(int(status_line.split()[1]), headers, body)


def chat_body(*, stream: bool = False, **fields: object) -> bytes:
    """A good chat request."""
    return json.dumps({"model": MODEL_ID, "messages": [{"role": "user", "content": "Say hello"}], "stream": stream, **fields}).encode()
