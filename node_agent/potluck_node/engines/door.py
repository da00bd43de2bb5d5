"""The door that an engine is asked through: an HTTP server on loopback with a path that nobody can guess.

Decides who gets in, and how much one may ask at a time. Loopback is everybody's on a machine, and only the agent is told the URL. Beside
the endpoints it has `/metrics`, for whatever the engine says of itself. It must not know what is behind it; `attach_server` and
`llamacpp_front` do.
"""

from __future__ import annotations

import json
import secrets
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from potluck_protocol.values import Endpoint

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
METRICS_PATH: Final = "/metrics"


@asynccontextmanager
async def open_door(
    answer: Callable[[Endpoint, web.Request], Awaitable[web.StreamResponse]],
    endpoints: Iterable[Endpoint],
    metrics: Callable[[], Awaitable[str]],
) -> AsyncIterator[str]:
    """Keeps a door open on a free loopback port until the block ends; the URL, which is as good as a key.

    Args:
        answer: called for each request; cancelled when its client hangs up.
        endpoints: what may be asked.
        metrics: called for what the engine says of itself, in Prometheus's text format.
    """
    application = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_refuse_browsers])
    secret_path = f"/{secrets.token_urlsafe(24)}"
    for endpoint in endpoints:
        application.router.add_post(secret_path + endpoint.value, partial(answer, endpoint))

    async def tell(_request: web.Request) -> web.Response:
        return web.Response(text=await metrics())

    application.router.add_get(secret_path + METRICS_PATH, tell)
    # Without handler_cancellation a handler would outlive its client.
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}{secret_path}"
    finally:
        await runner.cleanup()


def nobody_answered(message: str) -> web.HTTPBadGateway:
    """What a client gets where nobody behind the door answers it; to be raised."""
    text = json.dumps({"error": {"code": 502, "message": message, "type": "server_error"}})
    return web.HTTPBadGateway(text=text, content_type="application/json")


def no_answer(message: str) -> web.HTTPInternalServerError:
    """What a client gets where what came from behind the door is nothing to pass on; to be raised. Asking again would bring the same."""
    text = json.dumps({"error": {"code": 500, "message": message, "type": "server_error"}})
    return web.HTTPInternalServerError(text=text, content_type="application/json")


@web.middleware
async def _refuse_browsers(request: web.Request, handler: Any) -> web.StreamResponse:
    """A page open in this machine's browser may post to loopback; it cannot keep the browser from saying so."""
    if "origin" in request.headers:
        raise web.HTTPForbidden(text="This engine answers the node agent only.")
    response: web.StreamResponse = await handler(request)
    return response
