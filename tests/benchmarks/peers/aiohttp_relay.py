"""`python aiohttp_relay.py PORT ENGINE_URL…`: what any Python relay costs that only passes bytes on: aiohttp's server and its client.

Decides nothing but whose turn it is. It must not know what it relays.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

BODY_BYTES_MAX = 16 * 1024 * 1024


def application(engine_urls: list[str]) -> web.Application:
    engines = itertools.cycle(engine_urls)
    session: list[ClientSession] = []

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {"content-type": "application/json"}
        async with session[0].post(next(engines) + request.path, data=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status, headers={"content-type": answer.headers["content-type"]})
            response.content_length = answer.content_length
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    async def client(_application: web.Application) -> AsyncIterator[None]:
        connector = TCPConnector(limit=0)
        async with ClientSession(connector=connector, timeout=ClientTimeout(total=None), auto_decompress=False) as opened:
            session.append(opened)
            yield

    made = web.Application(client_max_size=BODY_BYTES_MAX)
    made.router.add_post("/{path:.*}", relay)
    made.cleanup_ctx.append(client)
    return made


if __name__ == "__main__":
    uvloop.install()
    web.run_app(application(sys.argv[2:]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
