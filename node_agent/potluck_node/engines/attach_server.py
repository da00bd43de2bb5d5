"""Stands for one model of a server that the owner runs.

`python -m potluck_node.engines.attach_server --name NAME --server "URL [KEY_FILE]"`

Waits until one of the servers lists the model, prints one line of JSON with its own URL, and forwards requests until that server is gone or
has the model no more. Then it ends, so that its supervisor knows, and the next one waits again. With `--lifeline` it lives no longer than
its stdin.

Decides that only the model's name in a request is changed, nothing in an answer, and that a client's hang-up closes the server's connection
at once. It must not know the link, and never asks the server for anything but models and answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import uvloop
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web

from potluck_node.attached_servers import ask, headers_of
from potluck_node.domain.attached import MODELS_PATH, AttachedServer, model_names, parse_attached
from potluck_node.lifeline import exit_with_parent
from potluck_protocol.values import Endpoint

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
WAIT_LIMIT_SECONDS: Final = 180.0
"""For a server that lists the model. So long, because a start that fails counts as a crash, and five within ten minutes as too many."""
WAIT_LOOK_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 5.0
LOOKS_MISSED_MAX: Final = 2
"""So many looks in a row without a server that listens and lists the model: it is gone. One that listens and says nothing is busy."""
CONNECT_LIMIT_SECONDS: Final = 5.0
EXIT_GONE: Final = 69


class GoneError(Exception):
    """No server has the model; its text is one line for people."""


async def server_with(http: ClientSession, servers: list[AttachedServer], name: str) -> AttachedServer:
    """The first server that lists the model, as soon as there is one; raises GoneError after the limit."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_LIMIT_SECONDS
    while True:
        found = []
        for server in servers:
            models = await ask(http, server, MODELS_PATH)
            if models is not None and name in model_names(models):
                return server
            status = "does not answer" if models is None else f"answers with status {models.status}"
            found.append(f"{server.place} {'does not list it' if models and models.status == 200 else status}")
        if loop.time() > deadline:
            raise GoneError(f"no attached server lists the model {name}: {', '.join(found)}")
        await asyncio.sleep(WAIT_LOOK_SECONDS)


class Front:
    """The door: one HTTP server on loopback, one client towards the attached server.

    Args:
        http: the client.
        server: the attached one.
        name: what it calls the model.
    """

    def __init__(self, http: ClientSession, server: AttachedServer, name: str) -> None:
        self._http = http
        self._server = server
        self._name = name
        self._in_doubt = asyncio.Event()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Keeps the door open on a free loopback port until the block ends; the URL, which is as good as a key."""
        application = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_refuse_browsers])
        secret_path = f"/{secrets.token_urlsafe(24)}"
        for endpoint in Endpoint:
            application.router.add_post(secret_path + endpoint.value, partial(self._forward, endpoint=endpoint))
        # Without handler_cancellation a handler would outlive its client.
        runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}{secret_path}"
        finally:
            await runner.cleanup()

    async def until_gone(self) -> None:
        """Looks again and again, and at once when a request found no server; raises GoneError."""
        missed_count = 0
        while missed_count < LOOKS_MISSED_MAX:
            # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_LOOK_SECONDS if missed_count else LOOK_SECONDS):
                    await self._in_doubt.wait()
            self._in_doubt.clear()
            missed_count = missed_count + 1 if await self._is_missed() else 0
        raise GoneError(f"the attached server went away: {self._server.place} serves {self._name} no more")

    async def _is_missed(self) -> bool:
        models = await ask(self._http, self._server, MODELS_PATH)
        if models is not None:
            return models.status == 200 and self._name not in model_names(models)
        return not await _listens(self._server)

    async def _forward(self, request: web.Request, *, endpoint: Endpoint) -> web.StreamResponse:
        body = _renamed(await request.read(), self._name)
        try:
            # The answer's bytes go on as they are, so they must not be packed.
            headers = headers_of(self._server) | {"accept-encoding": "identity"}
            response = await self._http.post(self._server.url + endpoint.value, data=body, headers=headers)
        except (ClientError, OSError, ValueError) as error:
            self._in_doubt.set()
            text = json.dumps({"error": {"code": 502, "message": "the attached server did not answer", "type": "server_error"}})
            raise web.HTTPBadGateway(text=text, content_type="application/json") from error
        async with response:
            return await _pass_on(request, response)


async def _pass_on(request: web.Request, response: ClientResponse) -> web.StreamResponse:
    passed = web.StreamResponse(status=response.status, headers={"content-type": response.headers.get("content-type", "application/json")})
    passed.content_length = response.content_length
    await passed.prepare(request)
    try:
        while piece := await response.content.readany():
            await passed.write(piece)
    except ClientError:
        # The client must not take what came so far for the whole answer.
        if request.transport is not None:
            request.transport.abort()
        return passed
    await passed.write_eof()
    return passed


def _renamed(body: bytes, name: str) -> bytes:
    """The same request for the model as the server calls it. What is no JSON object goes on as it is, and gets the server's own answer."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return body
    return json.dumps(asked | {"model": name}).encode() if isinstance(asked, dict) else body


async def _listens(server: AttachedServer) -> bool:
    host, _, port = server.place.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), CONNECT_LIMIT_SECONDS)
    except TimeoutError:
        return True
    except OSError:
        return False
    writer.close()
    return True


@web.middleware
async def _refuse_browsers(request: web.Request, handler: Any) -> web.StreamResponse:
    """A page open in this machine's browser may post to loopback; it cannot keep the browser from saying so."""
    if "origin" in request.headers:
        raise web.HTTPForbidden(text="This engine answers the node agent only.")
    response: web.StreamResponse = await handler(request)
    return response


async def _run(options: argparse.Namespace) -> None:
    connector = TCPConnector(limit=0, force_close=True)
    limit = ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_SECONDS)
    async with ClientSession(
        connector=connector, timeout=limit, auto_decompress=False, trust_env=False, cookie_jar=DummyCookieJar()
    ) as http:
        front = Front(http, await server_with(http, options.server, options.name), options.name)
        async with front.serve() as url:
            print(json.dumps({"url": url}), flush=True)  # noqa: T201 - how the supervisor learns the port
            await front.until_gone()


def main() -> None:
    parser = argparse.ArgumentParser(prog="potluck_node.engines.attach_server", description=__doc__)
    parser.add_argument("--name", required=True, help="what the server calls the model")
    parser.add_argument("--server", type=parse_attached, action="append", required=True, help="its URL, and the file of its key")
    parser.add_argument("--lifeline", action="store_true", help="exit when stdin ends")
    options = parser.parse_args()
    if options.lifeline:
        exit_with_parent()
    try:
        uvloop.run(_run(options))
    except GoneError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the supervisor's tail
        sys.exit(EXIT_GONE)


if __name__ == "__main__":
    main()
