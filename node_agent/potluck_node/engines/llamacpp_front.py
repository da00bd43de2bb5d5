"""A door in front of llama.cpp's own HTTP server that frees the slot when a client hangs up.

llama.cpp notices a hang-up only when it fails to write, so an answer that is not streamed goes on to its end with nobody there: measured on
xllamacpp 2026.10, 28 s for 2,000 tokens. This door asks for every answer streamed. A streamed answer passes through as the bytes it is; the
others are folded into one. Closing the door's connection closes llama.cpp's, and the slot is free at its next token.

Only the paths of `potluck_protocol.values.Endpoint` pass.
"""

from __future__ import annotations

import json
from typing import Any, Final

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web

from potluck_node.engines.fold import AnswerFold
from potluck_protocol.values import Endpoint

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
EVENT_BYTES_MAX: Final = 4 * 1024 * 1024
_JSON: Final = "application/json; charset=utf-8"
_STREAMED: Final = "text/event-stream"


class Front:
    """The door: one HTTP server on loopback, one client towards llama.cpp."""

    def __init__(self, engine_url: str) -> None:
        self._engine_url = engine_url
        self._session: ClientSession | None = None

    async def serve(self) -> str:
        """Opens the door on a free loopback port and returns its URL."""
        self._session = ClientSession(
            # llama.cpp closes a kept connection after its hundredth request, at times under the next one.
            connector=TCPConnector(limit=0, force_close=True),
            timeout=ClientTimeout(total=None, sock_connect=10),
            auto_decompress=False,
            # One event may be long; the default of 64 KiB would raise.
            read_bufsize=EVENT_BYTES_MAX,
        )
        application = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_refuse_browsers])
        application.router.add_post(Endpoint.CHAT_COMPLETIONS.value, self._generate)
        application.router.add_post(Endpoint.COMPLETIONS.value, self._generate)
        application.router.add_post(Endpoint.EMBEDDINGS.value, self._pass_whole)
        # Without handler_cancellation a handler would outlive its client.
        runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _post(self, path: str, body: bytes) -> ClientResponse:
        assert self._session is not None
        try:
            return await self._session.post(self._engine_url + path, data=body, headers={"content-type": "application/json"})
        except ClientError as error:
            text = json.dumps({"error": {"code": 502, "message": "llama.cpp did not answer", "type": "server_error"}})
            raise web.HTTPBadGateway(text=text, content_type="application/json") from error

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = _decoded(body)
        # What is no JSON object, or no boolean, gets the engine's own answer to it.
        if asked is None or asked.get("stream", False) is not False:
            async with await self._post(request.path, body) as response:
                return await _pass_stream(request, response)
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        async with await self._post(request.path, json.dumps(asked).encode()) as response:
            if response.content_type != _STREAMED:
                return await _pass_body(response)
            return await _fold(response)

    async def _pass_whole(self, request: web.Request) -> web.StreamResponse:
        async with await self._post(request.path, await request.read()) as response:
            return await _pass_body(response)


@web.middleware
async def _refuse_browsers(request: web.Request, handler: Any) -> web.StreamResponse:
    """A page open in this machine's browser may post to loopback; it cannot keep the browser from saying so."""
    if "origin" in request.headers:
        raise web.HTTPForbidden(text="This engine answers the node agent only.")
    response: web.StreamResponse = await handler(request)
    return response


def _decoded(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


async def _pass_body(response: ClientResponse) -> web.Response:
    content_type = response.headers.get("content-type", _JSON)
    return web.Response(status=response.status, body=await response.read(), headers={"content-type": content_type})


async def _pass_stream(request: web.Request, response: ClientResponse) -> web.StreamResponse:
    if response.content_type != _STREAMED:
        return await _pass_body(response)
    passed = web.StreamResponse(status=response.status, headers={"content-type": _STREAMED, "cache-control": "no-cache"})
    passed.enable_chunked_encoding()
    await passed.prepare(request)
    async for piece in response.content.iter_any():
        await passed.write(piece)
    await passed.write_eof()
    return passed


async def _fold(response: ClientResponse) -> web.Response:
    fold, complete = AnswerFold(), False
    async for line in response.content:
        complete = complete or line.startswith(b"data: [DONE]")
        if line.startswith((b"data: {", b"error: {")):
            event = json.loads(line.partition(b": ")[2])
            fold.add(event if line.startswith(b"data") else {"error": event})
    if fold.error is not None:
        code = fold.error.get("code")
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
        return web.json_response({"error": fold.error}, status=status)
    if not complete:
        error = {"code": 502, "message": "llama.cpp broke the answer off", "type": "server_error"}
        return web.json_response({"error": error}, status=502)
    return web.json_response(fold.answer())
