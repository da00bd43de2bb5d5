"""A door in front of llama.cpp's own HTTP server that frees the slot when a client hangs up, and that counts usage right.

llama.cpp notices a hang-up at once only when it fails to write, otherwise at its next look, once a second; and an answer that is not
streamed goes on to its end with nobody there: measured on xllamacpp 2026.10, 28 s for 2,000 tokens. This door asks for every answer
streamed and for word of the prompt's progress, so llama.cpp writes after each batch of the prompt and each token. Progress goes to nobody.
From its first token a streamed answer passes through as the bytes it is; unstreamed ones are folded into one. Closing the door's connection
closes llama.cpp's, and the slot is free at its next batch or token.

What llama.cpp says is also watched for a `standstill`: a grammar can keep it busy for ever, with all its answers waiting. Whoever opened
the door is told, once, and should end the process.

Of several choices llama.cpp counts each by itself. Such answers are read event by event, and leave with one usage record for them all.

Decides when llama.cpp learns that nobody waits any more, and what clients see of its events; `fold` and `usage_sum` do the adding up. It
must not know the link or the pool. Only chats and completions pass; `/metrics` is answered with llama.cpp's own, and with what its slots
hold, which it tells elsewhere.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web

from potluck_node.domain.event_stream import DataLines
from potluck_node.engines.asking import BEHIND_DOOR_SECONDS_MAX, ask_page
from potluck_node.engines.base import EngineAddress
from potluck_node.engines.door import nobody_answered, open_door
from potluck_node.engines.fold import AnswerFold
from potluck_node.engines.metrics import LLAMACPP_SLOTS, JsonPage
from potluck_node.engines.metrics_json import from_props
from potluck_node.engines.standstill import Standstill
from potluck_node.engines.usage_sum import UsageSum
from potluck_protocol.values import Endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

EVENT_BYTES_MAX: Final = 4 * 1024 * 1024
LOOK_SECONDS: Final = 0.5
"""Between looks for a standstill."""
BATCH_BYTES_MAX: Final = 8 * 1024
"""Of a prompt is read before the next word of its progress: a batch of 2,048 tokens."""
_BESIDE_METRICS: Final = (JsonPage("/props", partial(from_props, has_shared_cache=False)), LLAMACPP_SLOTS)
"""What llama.cpp is asked beside its metrics; `llamacpp_server` gives each slot a cache of its own."""
_QUESTION: Final = b'{"prompt":"Hello","max_tokens":1}'
"""Asked of an engine in doubt: it costs a token."""
_JSON: Final = "application/json; charset=utf-8"
_STREAMED: Final = "text/event-stream"
_DONE: Final = b"data: [DONE]"
_HEAD_FIELDS: Final = frozenset({"id", "object", "created", "model", "system_fingerprint"})


class Front:
    """What stands behind the door: one client towards llama.cpp.

    Args:
        engine_url: llama.cpp's.
        on_standstill: called when llama.cpp has work and says nothing any more.
    """

    def __init__(self, engine_url: str, on_standstill: Callable[[], None]) -> None:
        self._engine_url = engine_url
        self._on_standstill = on_standstill
        self._standstill = Standstill(monotonic)
        self._session: ClientSession | None = None

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Keeps the door open on a free loopback port until the block ends; the URL, which is as good as a key."""
        self._session = ClientSession(
            # llama.cpp closes a kept connection after its hundredth request, at times under the next one.
            connector=TCPConnector(limit=0, force_close=True),
            timeout=ClientTimeout(total=None, sock_connect=10),
            auto_decompress=False,
            # One event may be long; the default of 64 KiB would raise.
            read_bufsize=EVENT_BYTES_MAX,
        )
        watching = asyncio.create_task(self._watch(), name="standstill")
        try:
            async with open_door(self._generate, (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS), self._metrics) as url:
                yield url
        finally:
            watching.cancel()
            await self._session.close()

    async def _post(self, endpoint: Endpoint, body: bytes) -> ClientResponse:
        assert self._session is not None
        try:
            url, headers = self._engine_url + endpoint.value, {"content-type": "application/json"}
            asking = self._session.post(url, data=body, headers=headers, allow_redirects=False)
            return await self._standstill.hear(asking, min(len(body), BATCH_BYTES_MAX))
        except ClientError as error:
            raise nobody_answered("llama.cpp did not answer") from error

    async def _metrics(self) -> str:
        """Not heard by the standstill's watch: an engine that computes nothing any more may still tell them."""
        assert self._session is not None
        return await ask_page(self._session, "llamacpp", EngineAddress(self._engine_url), _BESIDE_METRICS, BEHIND_DOOR_SECONDS_MAX)

    async def _watch(self) -> None:
        asking: asyncio.Future[None] | None = None
        while not self._standstill.silence.is_too_long:
            await asyncio.sleep(LOOK_SECONDS)
            if self._standstill.is_in_doubt and (asking is None or asking.done()):
                asking = asyncio.ensure_future(self._ask())
        self._on_standstill()

    async def _ask(self) -> None:
        """Any answer will do."""
        with suppress(ClientError, web.HTTPException):
            async with await self._post(Endpoint.COMPLETIONS, _QUESTION) as response:
                await self._standstill.hear(response.read())

    async def _generate(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        try:
            return await self._generated(request, endpoint)
        except asyncio.CancelledError:
            self._standstill.left()
            raise

    async def _generated(self, request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
        body = await request.read()
        asked = _decoded(body)
        stream = None if asked is None else asked.get("stream")
        # What is no JSON object, or no boolean, gets the engine's own answer to it.
        if asked is None or not (stream is None or isinstance(stream, bool)):
            async with await self._post(endpoint, body) as response:
                return await _pass_body(response)
        prompt_count = _prompt_count(asked.get("prompt")) if endpoint is Endpoint.COMPLETIONS else 1
        wanted = asked | {"stream": True, "return_progress": True}
        if not stream:
            wanted["stream_options"] = {"include_usage": True}
        async with await self._post(endpoint, json.dumps(wanted).encode()) as response:
            if response.content_type != _STREAMED:
                return await _pass_body(response)
            if not stream:
                return await _fold(_events(response, self._standstill), prompt_count)
            several = _Several(asked, prompt_count) if prompt_count > 1 or _several_choices(asked) else None
            return await _pass_stream(request, response, self._standstill, several)


def _decoded(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


async def _pass_body(response: ClientResponse) -> web.Response:
    content_type = response.headers.get("content-type", _JSON)
    return web.Response(status=response.status, body=await response.read(), headers={"content-type": content_type})


def _prompt_count(prompt: Any) -> int:
    """As llama.cpp counts: a list of token ids, or of ids and texts mixed, is one prompt, any other list is as many as it is long."""
    if not isinstance(prompt, list) or not prompt:
        return 1
    has_ids = any(isinstance(part, int) for part in prompt)
    return 1 if has_ids and all(isinstance(part, int | str) for part in prompt) else len(prompt)


def _several_choices(asked: dict[str, Any]) -> bool:
    return any(asked.get(name) not in (None, 1) for name in ("n", "n_cmpl"))


def _is_event(line: bytes) -> bool:
    """Not an empty line, nor a comment, with which llama.cpp keeps a silent stream alive; the end of it all counts, too."""
    return not line or line.rstrip()[:1] not in (b"", b":")


async def _events(response: ClientResponse, standstill: Standstill) -> AsyncGenerator[bytes, None]:
    """The lines that say something, without their ends. Progress does not, nor the `null` before several prompts. Ends at a break, too."""
    try:
        while line := await standstill.hear(response.content.readline(), says_something=_is_event):
            event = line.rstrip()
            if _is_event(line) and event != b"data: null" and b'"prompt_progress":{' not in event:
                yield event
    except ClientError:
        return


class _Several:
    """The events of a streamed answer of several choices, with one usage record, before the end, if the client asked for it."""

    def __init__(self, asked: dict[str, Any], prompt_count: int) -> None:
        options = asked.get("stream_options")
        self._include_usage = isinstance(options, dict) and options.get("include_usage") is True
        self._usage = UsageSum(prompt_count)
        self._head: dict[str, Any] = {}

    def passed(self, event: bytes) -> bytes:
        """What the client gets for an event; may be empty."""
        if event == _DONE and self._include_usage:
            return _event({**self._head, "choices": [], "usage": self._usage.total()}) + event + b"\n\n"
        if not event.startswith(b"data: {"):
            return event + b"\n\n"
        content = json.loads(event[6:])
        had_usage = self._usage.take(content)
        self._head = {name: value for name, value in content.items() if name in _HEAD_FIELDS}
        if not had_usage:
            return event + b"\n\n"
        return _event(content) if content.get("choices") else b""


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


async def _pass_stream(
    request: web.Request, response: ClientResponse, standstill: Standstill, several: _Several | None
) -> web.StreamResponse:
    async with aclosing(_events(response, standstill)) as events:
        # Before its first event the answer has no status yet: one that fails here says so by it.
        first = await anext(events, b"")
        if not first:
            return _broken_off()
        error = _error_of(first)
        if error is not None:
            return _refused(error)
        passed = web.StreamResponse(status=response.status, headers={"content-type": _STREAMED, "cache-control": "no-cache"})
        passed.enable_chunked_encoding()
        await passed.prepare(request)
        if several is None:
            await passed.write(first + b"\n")  # the rest of its end is the first byte still to come
            lines = DataLines()
            while piece := await standstill.hear(response.content.readany(), says_something=lambda piece: not piece or lines.take(piece)):
                await passed.write(piece)
        else:
            await passed.write(several.passed(first))
            async for event in events:
                if kept := several.passed(event):
                    await passed.write(kept)
    await passed.write_eof()
    return passed


async def _fold(events: AsyncIterator[bytes], prompt_count: int) -> web.Response:
    fold, complete = AnswerFold(prompt_count), False
    async for event in events:
        complete = complete or event == _DONE
        if (error := _error_of(event)) is not None:
            return _refused(error)
        if event.startswith(b"data: {"):
            fold.add(json.loads(event[6:]))
    return web.json_response(fold.answer()) if complete else _broken_off()


def _error_of(event: bytes) -> dict[str, Any] | None:
    """The engine's own error object, if the event is one."""
    if event.startswith(b"error: {"):
        error: dict[str, Any] = json.loads(event[7:])
        return error
    if event.startswith(b'data: {"error":{'):
        return json.loads(event[6:])["error"]  # type: ignore[no-any-return]
    return None


def _refused(error: dict[str, Any]) -> web.Response:
    code = error.get("code")
    return web.json_response({"error": error}, status=code if isinstance(code, int) and 400 <= code <= 599 else 500)


def _broken_off() -> web.Response:
    return _refused({"code": 502, "message": "llama.cpp broke the answer off", "type": "server_error"})
