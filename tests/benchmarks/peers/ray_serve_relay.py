"""`python ray_serve_relay.py PORT ENGINE_URL…`: Ray Serve passing bytes on, behind whichever proxy the environment asks for.

Runs in the peer's own environment. Decides nothing but whose turn it is. It must not know what it relays.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import AsyncIterator

import aiohttp
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

REQUESTS_MAX = 1024
HOST = "127.0.0.1"
QUIET = {"log_level": "ERROR", "enable_access_log": False}


@serve.deployment(max_ongoing_requests=REQUESTS_MAX, ray_actor_options={"num_cpus": 0}, logging_config=QUIET)
class Relay:
    """One replica, as every other contender is one relay."""

    def __init__(self, engine_urls: list[str]) -> None:
        self._engines = itertools.cycle(engine_urls)
        self._client: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Response:
        if self._client is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._client = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False)
        url, headers = next(self._engines) + request.url.path, {"content-type": "application/json"}
        answer = await self._client.post(url, data=await request.body(), headers=headers)
        media_type = answer.headers["content-type"]
        if answer.content_length is not None:
            return Response(await answer.read(), status_code=answer.status, media_type=media_type)
        return StreamingResponse(_pieces(answer), status_code=answer.status, media_type=media_type)


async def _pieces(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with answer:
        async for piece in answer.content.iter_any():
            yield piece


def main() -> None:
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, configure_logging=False, _node_ip_address=HOST)
    serve.start(http_options={"host": HOST, "port": int(sys.argv[1])}, logging_config=QUIET)
    serve.run(Relay.bind(sys.argv[2:]), name="relay", route_prefix="/")
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    main()
