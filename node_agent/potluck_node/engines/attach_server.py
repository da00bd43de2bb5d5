"""Stands for one model of a server that the owner runs.

`POTLUCK_ATTACHED_SERVERS='["URL [KEY_FILE]"]' python -m potluck_node.engines.attach_server --name NAME`

Waits until one of the servers lists the model, prints one line of JSON with its own URL, and forwards requests until that server is gone or
has the model no more. Then it ends, so that its supervisor knows, and the next one waits again. With `--lifeline` it lives no longer than
its stdin.

Decides that only the model's name in a request is changed, nothing in an answer, that a client's hang-up closes the server's connection at
once, that a redirect is no answer, nor is a packed one, and when the server is gone. One that listens may be at its owner's work: it is
given up only where, while somebody waits here, neither an answer nor its list of models came for as long as any request may take. Its
`/metrics` are the server's own in our words, read in the dialect of the software that the server is recognised as. It must not know the
link, and never asks the server for anything but models, answers and what it says of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from contextlib import AbstractAsyncContextManager, suppress
from http import HTTPStatus
from time import monotonic
from typing import Final, NoReturn

import uvloop
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web

from potluck_node.attached_servers import CONNECT_LIMIT_SECONDS, address_of, ask, headers_of, listens, words_of
from potluck_node.domain.attached import (
    BUSY_STATUSES,
    MODELS_PATH,
    WORD_SECONDS_MAX,
    AttachedServer,
    is_conclusive,
    model_names,
    parse_attached,
    recognised_kind,
)
from potluck_node.engines.asking import BEHIND_DOOR_SECONDS_MAX, ask_load
from potluck_node.engines.attach import SERVERS_VARIABLE
from potluck_node.engines.door import no_answer, nobody_answered, open_door
from potluck_node.engines.metrics import metrics_of
from potluck_node.engines.metrics_page import page_of
from potluck_node.engines.standstill import Standstill
from potluck_node.lifeline import exit_with_parent
from potluck_protocol.values import Endpoint

WAIT_LIMIT_SECONDS: Final = 180.0
"""For a server that lists the model. So long, because a start that fails counts as a crash, and five within ten minutes as too many."""
WAIT_LOOK_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 5.0
LOOKS_MISSED_MAX: Final = 2
"""So many looks in a row without a server that listens and lists the model: it is gone. One that listens and says nothing is busy, up to
`WORD_SECONDS_MAX`."""
EXIT_GONE: Final = 69
EMBEDS_ONLY_WORDS: Final = "a model is ready once a token came from there, so one that gives none, as for embeddings only, cannot be shared"


class GoneError(Exception):
    """No server has the model, or it says nothing; its text is one line for people, with the words by which `failures` knows which."""


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
    """What stands behind the door: one client towards the attached server.

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
        self._standstill = Standstill(monotonic)
        self._under_way_count = 0
        self._kind: str | None = None
        """Of engine, for its metrics; None: not yet known."""
        self._gave_tokens = False

    def serve(self) -> AbstractAsyncContextManager[str]:
        """As `open_door`."""
        return open_door(self._forward, Endpoint, self._metrics)

    async def until_gone(self) -> None:
        """Looks again and again, and at once when a request found no server; raises GoneError when it is, or says nothing any more."""
        missed_count = 0
        while missed_count < LOOKS_MISSED_MAX:
            # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_LOOK_SECONDS if missed_count else LOOK_SECONDS):
                    await self._in_doubt.wait()
            self._in_doubt.clear()
            missed_count = missed_count + 1 if await self._is_missed() else 0
            silence = self._standstill.silence
            if silence.listening_count and silence.silent_seconds > WORD_SECONDS_MAX:
                seconds = f"{silence.silent_seconds:.0f} s"
                raise GoneError(f"{self._server.place} says nothing any more: no answer and no list of models for {seconds}")
        raise GoneError(f"the attached server went away: {self._server.place} serves {self._name} no more")

    async def _is_missed(self) -> bool:
        models = await ask(self._http, self._server, MODELS_PATH)
        if models is not None:
            self._standstill.heard()
            return models.status == 200 and self._name not in model_names(models)
        return not await listens(self._server)

    async def _metrics(self) -> str:
        """What the server says of itself; nothing while its key file cannot be read, or it is not known which software it is.

        While nobody asks it anything here it may sleep, and must not be woken by being asked how it is.
        """
        if self._kind is None:
            models = await ask(self._http, self._server, MODELS_PATH)
            if models is None or models.status != 200:
                return ""
            words = await words_of(self._http, self._server, models)
            if not is_conclusive(words):
                return ""
            self._kind = recognised_kind(words)
        try:
            address = address_of(self._server)
        except (OSError, ValueError):
            return ""
        load = await ask_load(self._http, self._kind, address, BEHIND_DOOR_SECONDS_MAX, may_wake=self._under_way_count > 0)
        return page_of(metrics_of(load))

    async def _forward(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        self._under_way_count += 1
        try:
            return await self._forwarded(endpoint, request)
        finally:
            self._under_way_count -= 1

    async def _forwarded(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        body = _renamed(await request.read(), self._name)
        try:
            # The answer's bytes go on as they are, so they must not be packed.
            headers = headers_of(self._server) | {"accept-encoding": "identity"}
            url = self._server.url + endpoint.value
            response = await self._standstill.hear(self._http.post(url, data=body, headers=headers, allow_redirects=False))
        except (ClientError, OSError, ValueError) as error:
            self._in_doubt.set()
            raise nobody_answered("the attached server did not answer") from error
        async with response:
            self._check(endpoint, response)
            return await _pass_on(request, response, self._standstill)

    def _check(self, endpoint: Endpoint, response: ClientResponse) -> None:
        """Raises where this is no answer to pass on. What keeps it from getting ready goes to stderr, too, so that its failure says so."""
        status, encoding = response.status, response.headers.get("content-encoding", "identity").strip().lower()
        if 300 <= status < 400:
            # A redirect may lead anywhere, with the prompt, and somebody else's answer would come back as the model's.
            self._refuse(f"redirects (HTTP status {status}), which is not followed; attach the URL that answers itself")
        if encoding not in {"", "identity"}:
            self._refuse(f"packs its answers ({encoding!a:.40}) although it was asked not to; switch compression off there")
        if endpoint is Endpoint.COMPLETIONS and not self._gave_tokens:
            self._gave_tokens = status == HTTPStatus.OK
            if not self._gave_tokens and status not in BUSY_STATUSES:
                _tell(f"{self._server.place} answers {endpoint.value} with HTTP status {status}; {EMBEDS_ONLY_WORDS}")

    def _refuse(self, what: str) -> NoReturn:
        text = f"the attached server {what}"
        _tell(f"{text} ({self._server.place})")
        raise no_answer(text)


async def _pass_on(request: web.Request, response: ClientResponse, standstill: Standstill) -> web.StreamResponse:
    passed = web.StreamResponse(status=response.status, headers={"content-type": response.headers.get("content-type", "application/json")})
    passed.content_length = response.content_length
    await passed.prepare(request)
    try:
        while piece := await standstill.hear(response.content.readany()):
            await passed.write(piece)
    except ClientError:
        # The client must not take what came so far for the whole answer.
        if request.transport is not None:
            request.transport.abort()
        return passed
    await passed.write_eof()
    return passed


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the supervisor's tail


def _renamed(body: bytes, name: str) -> bytes:
    """The same request for the model as the server calls it. What is no JSON object goes on as it is, and gets the server's own answer."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return body
    return json.dumps(asked | {"model": name}).encode() if isinstance(asked, dict) else body


async def _run(options: argparse.Namespace) -> None:
    connector = TCPConnector(limit=0, force_close=True)
    limit = ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_SECONDS)
    async with ClientSession(
        connector=connector, timeout=limit, auto_decompress=False, trust_env=False, cookie_jar=DummyCookieJar()
    ) as http:
        servers = [parse_attached(text) for text in json.loads(os.environ[SERVERS_VARIABLE])]
        front = Front(http, await server_with(http, servers, options.name), options.name)
        async with front.serve() as url:
            print(json.dumps({"url": url}), flush=True)  # noqa: T201 - how the supervisor learns the port
            await front.until_gone()


def main() -> None:
    parser = argparse.ArgumentParser(prog="potluck_node.engines.attach_server", description=__doc__)
    parser.add_argument("--name", required=True, help="what the server calls the model")
    parser.add_argument("--lifeline", action="store_true", help="exit when stdin ends")
    options = parser.parse_args()
    if options.lifeline:
        exit_with_parent()
    try:
        uvloop.run(_run(options))
    except GoneError as error:
        _tell(str(error))
        sys.exit(EXIT_GONE)


if __name__ == "__main__":
    main()
